"""Opening files of rows by their format: parquet, JSON, JSON lines, CSV, text, Arrow. All of them are a `Table`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from shards.catalog import TableFormat
from shards.schema import Source
from shards.sources.content import COMPRESSED_SUFFIXES, binary_kind, is_compressed
from shards.sources.json_table import open_records
from shards.sources.parquet import MissingSourceError, SourceError, open_parquet
from shards.sources.paths import is_system_file

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}


class Table(Protocol):
    """A table of several files in order; rows are numbered through all of them. `digests`: a hash per file."""

    @property
    def files(self) -> tuple[Path, ...]: ...  # noqa: D102
    @property
    def digests(self) -> tuple[str, ...]: ...  # noqa: D102

    def __len__(self) -> int:
        """Number of rows."""

    def first(self, most: int) -> list[dict[str, Any]]:
        """The first rows of the table, with all columns."""

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Group row numbers by the value of a column, in order of first appearance; None: each row is a group."""

    def row_bytes(self, columns: Iterable[str]) -> int:
        """Mean size of these columns of a row, in bytes; an estimate."""

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Read rows in the given order, each with its source."""


def open_table(root: Path, pattern: str, columns: Iterable[str], form: TableFormat | None = None) -> Table:
    """Open the files below `root` that match a glob as one table.

    Raises:
        MissingSourceError: no file matches.
        SourceError: a file is unreadable or lacks a column; lists the columns that exist.
    """
    form = form or TableFormat()
    files = tuple(sorted(file for file in root.glob(pattern) if not is_system_file(file.relative_to(root))))
    if not files:
        raise MissingSourceError(f"{root / pattern}: no such file")
    kind = form.kind or _kind_of_name(files[0])
    if kind != "lines":  # a file of another kind than its name says is read as what it is
        try:
            kind = binary_kind(files[0]) or kind
        except OSError as error:
            raise SourceError(f"{files[0]}: cannot be read ({error})") from None
    if kind is None:
        raise SourceError(f"{files[0]}: cannot tell its format; give the catalog row `table.kind`")
    if kind == "parquet" and not form.explode and not any(map(is_compressed, files)):
        return open_parquet(root, files, columns)
    return open_records(root, files, columns, kind, form)


def _kind_of_name(file: Path) -> str | None:
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file
    return SUFFIXES.get(name.suffix.lower())
