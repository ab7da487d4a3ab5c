"""Parquet files as one table: row counts, single columns, and selected rows. Rows are not cached in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.format import canonical_json
from shards.schema import Source
from shards.sources.paths import at


class SourceError(ValueError):
    """A source is missing, unreadable, or does not have the expected columns."""


class MissingSourceError(SourceError):
    """A source is missing."""


@dataclass(frozen=True, slots=True)
class ParquetTable:
    """A table of several files in order; rows are numbered through all of them.

    Attributes:
        root: the dataset's folder.
        files: paths below it.
        counts: rows of each file.
        digests: sha256 of each file's footer, which holds sizes and statistics of every chunk.
    """

    root: Path
    files: tuple[Path, ...]
    counts: tuple[int, ...]
    digests: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Group row numbers by the value of a column, in order of first appearance; None: each row is a group."""
        if column is None:
            return [(number,) for number in range(len(self))]
        root = column.partition(".")[0]
        rows = (row for file in self.files for row in pq.read_table(file, columns=[root]).to_pylist())
        return numbers_by_value(at(row, column) for row in rows)

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Read rows in the given order, each with its source.

        Raises:
            SourceError: a file is damaged.
        """
        wanted = sorted(set(rows))
        by_number: dict[int, tuple[Source, dict[str, Any]]] = {}
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        names = sorted({path.partition(".")[0] for path in columns})
        for number, file in enumerate(self.files):
            local = [row - int(starts[number]) for row in wanted if starts[number] <= row < starts[number + 1]]
            for row, values in _read_rows(file, local, names):
                source = Source(file=file.relative_to(self.root).as_posix(), row=row)
                by_number[row + int(starts[number])] = (source, values)
        return [by_number[row] for row in rows]


def numbers_by_value(values: Iterable[Any]) -> list[tuple[int, ...]]:
    """Group positions by value, in order of first appearance; a value may be a list or a struct."""
    groups: dict[Any, list[int]] = {}
    for number, value in enumerate(values):
        key = canonical_json(value) if isinstance(value, list | dict) else value
        groups.setdefault(key, []).append(number)
    return [tuple(numbers) for numbers in groups.values()]


def open_parquet(root: Path, files: tuple[Path, ...], columns: Iterable[str]) -> ParquetTable:
    """Open parquet files below `root` as a table.

    Raises:
        SourceError: a file is unreadable or lacks a column; lists the columns that exist.
    """
    wanted = sorted(set(columns))
    counts, footers = [], []
    for file in files:
        try:
            schema, rows, footer = pq.read_schema(file), pq.read_metadata(file).num_rows, _footer(file)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file}: not a readable parquet file ({error}); fetch it again") from None
        missing = [path for path in wanted if not _has(schema, path)]
        if missing:
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; "
                "correct `columns` of the catalog row, or fetch the revision that it was written for"
            )
        counts.append(rows)
        footers.append(hashlib.sha256(footer).hexdigest())
    return ParquetTable(root, files, tuple(counts), tuple(footers))


def _has(fields: Any, path: str) -> bool:
    """Whether a schema or a struct type has a field at a dotted path, through lists."""
    first, _, rest = path.partition(".")
    if isinstance(fields, pa.Schema):
        return first in fields.names and (not rest or _has(fields.field(first).type, rest))
    if pa.types.is_list(fields) or pa.types.is_large_list(fields):
        return _has(fields.value_type, path)
    names = [field.name for field in fields] if pa.types.is_struct(fields) else []
    return first in names and (not rest or _has(fields.field(first).type, rest))


def _footer(path: Path) -> bytes:
    with open(path, "rb") as file:
        end = file.seek(-8, os.SEEK_END)  # 4 bytes of length, then "PAR1"
        length = int.from_bytes(file.read(4), "little")
        file.seek(end - length)
        return file.read(length)


def _read_rows(file: Path, rows: list[int], columns: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Read ascending rows of one file; only the row groups that hold them are read."""
    if not rows:
        return
    reader = pq.ParquetFile(file)
    start, place = 0, 0
    for number in range(reader.num_row_groups):
        end = start + reader.metadata.row_group(number).num_rows
        here = []
        while place < len(rows) and rows[place] < end:
            here.append(rows[place])
            place += 1
        if here:
            try:
                taken = reader.read_row_group(number, columns).take([row - start for row in here]).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{file}: row group {number} is damaged ({error}); fetch the file again") from None
            yield from zip(here, taken, strict=True)
        start = end
