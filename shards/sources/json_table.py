"""JSON, CSV, text and Arrow files, and parquet files with exploded lists, as one table.

Each process caches the rows of the last few files in memory.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.catalog import TableFormat
from shards.schema import Source
from shards.sources.json_text import parse_json
from shards.sources.parquet import SourceError, numbers_by_value
from shards.sources.paths import at, has

Record = dict[str, Any]

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class RecordTable:
    """A table of several files in order; rows are numbered through all of them.

    Attributes:
        root: the dataset's folder.
        files: paths below it.
        counts: rows of each file.
        digests: sha256 of each file.
        kind: file format, see `TableFormat.kind`.
        form: the format of the files.
    """

    root: Path
    files: tuple[Path, ...]
    counts: tuple[int, ...]
    digests: tuple[str, ...]
    kind: str
    form: TableFormat

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Group row numbers by the value of a column, in order of first appearance; None: each row is a group."""
        if column is None:
            return [(number,) for number in range(len(self))]
        return numbers_by_value(at(row, column) for file in self.files for row in self._rows(file))

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, Record]]:
        """Read rows in the given order, each with its source; the row of a source counts from 0 in its file."""
        roots = {path.partition(".")[0] for path in columns} | set(columns)
        starts = [0, *accumulate(self.counts)]
        by_number: dict[int, tuple[Source, Record]] = {}
        for number, file in enumerate(self.files):
            here = [row for row in set(rows) if starts[number] <= row < starts[number + 1]]
            records = self._rows(file) if here else ()
            for row in here:
                local = row - starts[number]
                values = {name: value for name, value in records[local].items() if name in roots}
                by_number[row] = (Source(file=file.relative_to(self.root).as_posix(), row=local), values)
        return [by_number[row] for row in rows]

    def _rows(self, file: Path) -> tuple[Record, ...]:
        return _load(file, self.kind, self.form.model_dump_json())[1]


def open_records(
    root: Path, files: tuple[Path, ...], columns: Iterable[str], kind: str, form: TableFormat
) -> RecordTable:
    """Open files of one format as a table.

    Raises:
        SourceError: a file is unreadable, or none of its rows has one of the columns; lists the columns that exist.
    """
    wanted = sorted(set(columns))
    counts, digests = [], []
    for file in files:
        digest, rows = _load(file, kind, form.model_dump_json())
        if missing := [path for path in wanted if rows and not any(has(row, path) for row in rows)]:
            names = dict.fromkeys(name for row in rows[:1000] for name in row)
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(names)}; "
                "correct `columns` of the catalog row, or fetch the revision that it was written for"
            )
        counts.append(len(rows))
        digests.append(digest)
    return RecordTable(root, files, tuple(counts), tuple(digests), kind, form)


@functools.lru_cache(maxsize=4)
def _load(file: Path, kind: str, form_json: str) -> tuple[str, tuple[Record, ...]]:
    """sha256 and rows of a file. The format is passed as JSON, because a model with lists is not hashable."""
    form = TableFormat.model_validate_json(form_json)
    try:
        data = file.read_bytes()
        rows = tuple(_rows(data, kind, form))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{file}: not a readable {kind} file ({error}); fetch it again") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise SourceError(
                f"{file} row {number}: expected an object with columns, found {type(row).__name__}; "
                "correct `table` of the catalog row"
            )
    return hashlib.sha256(data).hexdigest(), rows


def _rows(data: bytes, kind: str, form: TableFormat) -> Iterator[Any]:
    if kind == "parquet":
        return _exploded(pq.read_table(pa.BufferReader(data)).to_pylist(), form)
    if kind == "arrow":  # the stream format, which the datasets library writes
        if not data.endswith(_END_OF_STREAM):  # pyarrow reads a stream that is cut between two batches without an error
            raise ValueError("the stream is cut short")
        return _exploded(pa.ipc.open_stream(data).read_all().to_pylist(), form)
    text = data.decode("utf-8-sig")
    if kind == "lines":
        return _lines(text, form)
    return _csv(text, kind, form) if kind in {"csv", "tsv"} else _json(text, kind, form)


def _lines(text: str, form: TableFormat) -> Iterator[Record]:
    lines = [line for line in text.split("\n")[form.skip :] if line.strip()]
    for number, line in enumerate(lines):
        match = re.fullmatch(form.pattern, line.rstrip("\r"))
        if match is None:
            raise ValueError(f"line {number + form.skip + 1} is not of the form {form.pattern!r}: {line[:60]!r}")
        yield {**match.groupdict(), **({form.number: str(number)} if form.number else {})}


def _csv(text: str, kind: str, form: TableFormat) -> Iterator[Record]:
    lines = io.StringIO(text, newline="")
    for _ in range(form.skip):
        lines.readline()
    reader = csv.DictReader(
        lines, fieldnames=form.header or None, delimiter="\t" if kind == "tsv" else ",", strict=True
    )
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than the header")
        yield row


def _json(text: str, kind: str, form: TableFormat) -> Iterator[Any]:
    if kind == "jsonl":
        lines = text.split("\n")[form.skip :]  # not splitlines(): a string may hold other line separators
        documents: Iterable[Any] = (parse_json(line) for line in lines if line.strip())
        documents = _named(documents) if form.names_first else documents
    else:
        documents = _records(parse_json(text), form)
    return _exploded(documents, form)


def _named(lines: Iterable[Any]) -> Iterator[Record]:
    names: list[str] | None = None
    for line in lines:
        if names is None:
            names = line
        else:
            yield dict(zip(names, line, strict=True))


def _records(document: Any, form: TableFormat) -> list[Any]:
    if form.records == ".":
        return [document]
    records = at(document, form.records) if form.records else document
    if isinstance(records, dict):
        return _values(records, form.key)
    if not isinstance(records, list):
        raise ValueError(f"expected a list or an object at {form.records!r}, found {type(records).__name__}")
    return records


def _exploded(documents: Iterable[Any], form: TableFormat) -> Iterator[Any]:
    """Yield a row for each item of the list (or object) at `form.explode`, together with the outer fields."""
    for document in documents:
        if not form.explode:
            yield document
            continue
        items = document.get(form.explode) or ()
        for item in _values(items, form.key) if isinstance(items, dict) else items:
            yield {**document, form.explode: item}


def _values(mapping: dict[str, Any], key: str | None) -> list[Any]:
    if key is None:
        return list(mapping.values())
    rows = mapping.items()
    return [{**value, key: name} if isinstance(value, dict) else {key: name, "value": value} for name, value in rows]
