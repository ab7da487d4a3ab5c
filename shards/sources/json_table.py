"""JSON, CSV, text and Arrow files, and parquet files with exploded lists, as one table.

Each process caches the rows of the last few files in memory; those of a large file stay on the disk where its rows
follow each other (JSON lines, a JSON array, CSV, lines, Arrow). A JSON object of rows is always held in memory.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.catalog import TableFormat
from shards.schema import Source
from shards.sources.content import DAMAGED_CONTENT, STREAM_ABOVE, is_compressed, open_content
from shards.sources.json_text import DECODER, first_bad_line, parse_json
from shards.sources.parquet import SourceError, numbers_by_value
from shards.sources.paths import at, column_remedy, has, remedy
from shards.sources.streamed import (
    SPACE,
    ArrowDocuments,
    DocumentSizeError,
    StreamedRows,
    TextDocuments,
    csv_places,
    json_places,
    line_places,
)

Record = dict[str, Any]

MAX_FIELD = 1 << 30  # characters of a field of a CSV, such as an image as base64; the csv module's own limit is 131072
DELIMITERS = {"csv": ",", "tsv": "\t"}
ARROW_FILE = b"ARROW1"
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

    def first(self, most: int) -> list[Record]:
        """The first rows of the first file, with all columns."""
        return list(self._rows(self.files[0])[:most])

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Group row numbers by the value of a column, in order of first appearance; None: each row is a group."""
        if column is None:
            return [(number,) for number in range(len(self))]
        return numbers_by_value(at(row, column) for file in self.files for row in self._rows(file))

    def row_bytes(self, columns: Iterable[str]) -> int:
        """Mean size of a row in bytes: that of its text, whatever the columns."""
        size = sum(file.stat().st_size for file in self.files)
        return size // max(len(self), 1)

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

    def _rows(self, file: Path) -> Sequence[Record]:
        return _load(file, self.kind, self.form)[1]


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
        digest, rows = _load(file, kind, form)
        if missing := [path for path in wanted if len(rows) and not any(has(row, path) for row in rows)]:
            names = dict.fromkeys(name for row in rows[:1000] for name in row)
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(names)}; {column_remedy(file)}"
            )
        counts.append(len(rows))
        digests.append(digest)
    return RecordTable(root, files, tuple(counts), tuple(digests), kind, form)


def _load(file: Path, kind: str, form: TableFormat) -> tuple[str, Sequence[Record]]:
    """sha256 and rows of a file. A file that was changed since the last call is read again."""
    try:
        status = file.stat()
    except OSError as error:
        raise SourceError(f"{file}: not a readable {kind} file ({error}); {remedy(file)}") from None
    return _load_version(file, (status.st_size, status.st_mtime_ns), kind, form.model_dump_json())


@functools.lru_cache(maxsize=4)
def _load_version(file: Path, version: tuple[int, int], kind: str, form_json: str) -> tuple[str, Sequence[Record]]:
    """`_load` for one version of a file. The format is passed as JSON, because a model with lists is not hashable."""
    form = TableFormat.model_validate_json(form_json)
    try:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        rows = _read(file, kind, form)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file}: not a readable {kind} file: its text is not UTF-8 ({error}); convert it, such as with "
            f"`iconv -f latin1 -t utf-8`, or {remedy(file)}"
        ) from None
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException, *DAMAGED_CONTENT) as error:
        reason = _bad_line(file, form) if kind == "jsonl" else None
        raise SourceError(f"{file}: not a readable {kind} file ({reason or error}); {remedy(file)}") from None
    except MemoryError:
        raise SourceError(f"{file}: too large for the memory; convert it to JSON lines or parquet") from None
    if not isinstance(rows, StreamedRows):
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                reason = _bad_line(file, form) if kind == "jsonl" else None
                reason = reason or f"row {number}: expected an object with columns, found {type(row).__name__}"
                raise SourceError(f"{file}: {reason}; correct `table` of the catalog row, or the file")
    return digest, rows


def _bad_line(file: Path, form: TableFormat) -> str | None:
    """The first broken line of JSON lines and what is wrong with it; None if it has none, or cannot be read."""
    try:
        with open_content(file, text=True) as content:
            return first_bad_line(content, form.skip, list if form.names_first else dict)
    except (OSError, ValueError, *DAMAGED_CONTENT):
        return None


def _read(file: Path, kind: str, form: TableFormat) -> Sequence[Any]:
    """The rows of a file: in memory, or read from the disk where the content is large and its places can be listed."""
    csv.field_size_limit(MAX_FIELD)
    content = open_content(file, text=kind not in {"parquet", "arrow"})
    try:
        start = content.tell()
        size = content.seek(0, os.SEEK_END)
        content.seek(start)
        if size > STREAM_ABOVE and (documents := _documents(content, file, kind, form)) is not None:
            return StreamedRows(documents, lambda document: list(_exploded([document], form)))
        content.seek(start)
        rows = tuple(_rows(content.read(), kind, form))
    except BaseException:
        content.close()
        raise
    content.close()
    return rows


def _documents(content: IO[bytes], file: Path, kind: str, form: TableFormat) -> TextDocuments | ArrowDocuments | None:
    """The documents of a large content; None if it is of a kind that must be read as a whole."""
    if kind == "arrow":
        with content:
            return ArrowDocuments(_arrow_table(content if is_compressed(file) else pa.memory_map(str(file)), content))
    if kind == "lines":
        places = list(line_places(content, form.skip))
        return TextDocuments(content, places, lambda data, number: _line(data.decode(), number, form))
    if kind in {"csv", "tsv"}:
        places = list(csv_places(content, DELIMITERS[kind], form.skip))
        header = list(form.header) or _fields(content, places.pop(0), kind)
        return TextDocuments(content, places, lambda data, _: next(_csv(data.decode(), kind, header)))
    if kind == "jsonl" and form.names_first:
        places = list(line_places(content, form.skip))
        content.seek(places[0][0])
        names = json.loads(content.readline())
        return TextDocuments(content, places[1:], lambda data, _: dict(zip(names, parse_json(data), strict=True)))
    if form.records or form.key:
        return None
    try:
        places = list(json_places(content, form.skip if kind == "jsonl" else 0))
    except DocumentSizeError:
        return None
    lines = kind == "jsonl" or len(places) > 1
    return TextDocuments(content, places, lambda data, _: parse_json(data)) if lines else None


def _arrow_table(source: Any, content: IO[bytes]) -> pa.Table:
    """The table of an Arrow file, or of a stream, which the datasets library writes."""
    content.seek(0)
    if content.read(len(ARROW_FILE)) == ARROW_FILE:
        return pa.ipc.open_file(source).read_all()
    size = content.seek(0, os.SEEK_END)
    content.seek(max(size - len(_END_OF_STREAM), 0))
    if content.read() != _END_OF_STREAM:  # pyarrow reads a stream that is cut between two batches without an error
        raise ValueError("the stream is cut short")
    content.seek(0)
    return pa.ipc.open_stream(source).read_all()


def _rows(data: bytes, kind: str, form: TableFormat) -> Iterator[Any]:
    if kind == "parquet":
        return _exploded(pq.read_table(pa.BufferReader(data)).to_pylist(), form)
    if kind == "arrow":
        return _exploded(_arrow_table(pa.BufferReader(data), io.BytesIO(data)).to_pylist(), form)
    text = data.decode()
    if kind == "lines":
        lines = (line for line in text.split("\n")[form.skip :] if line.strip())
        return (_line(line, number, form) for number, line in enumerate(lines))
    if kind in {"csv", "tsv"}:
        return _csv(_without_lines(text, form.skip), kind, form.header)
    return _exploded(_json(text, kind, form), form)


def _line(line: str, number: int, form: TableFormat) -> Record:
    match = re.fullmatch(form.pattern, line.rstrip("\r\n"))
    if match is None:
        raise ValueError(f"row {number} (from 0) is not of the form {form.pattern!r}: {line[:60]!r}")
    return {**match.groupdict(), **({form.number: str(number)} if form.number else {})}


def _csv(text: str, kind: str, header: Sequence[str]) -> Iterator[Record]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), fieldnames=header or None, delimiter=DELIMITERS[kind], strict=True
    )
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more fields than the header")
        yield row


def _fields(content: IO[bytes], place: tuple[int, int], kind: str) -> list[str]:
    """The fields of one record of a CSV."""
    content.seek(place[0])
    text = content.read(place[1] - place[0]).decode()
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[kind], strict=True))


def _without_lines(text: str, skip: int) -> str:
    lines = io.StringIO(text, newline="")
    for _ in range(skip):
        lines.readline()
    return lines.read()


def _json(text: str, kind: str, form: TableFormat) -> Iterable[Any]:
    """The documents of JSON lines or of one JSON document; which of them a file holds is told by its content."""
    if kind == "jsonl":
        if form.names_first:
            lines = text.split("\n")[form.skip :]  # not splitlines(): a string may hold other line separators
            return _named(parse_json(line) for line in lines if line.strip())
        text = _without_lines(text, form.skip)
    values = _values_of(text)
    if kind == "json" and not values:
        raise ValueError("it is empty")
    if len(values) == 1 and (kind == "json" or isinstance(values[0], list) or form.records or form.key):
        return _records(values[0], form)
    if len(values) > 1 and (form.records or form.key):
        raise ValueError(f"it holds {len(values)} JSON values, one for each row: `records` and `key` do not apply")
    return values


def _values_of(text: str) -> list[Any]:
    """The JSON values of a text, one after the other; an error names the line of the text."""
    values: list[Any] = []
    place = 0
    while True:
        skipped = SPACE.match(text, place)
        assert skipped is not None  # it matches the empty text
        if skipped.end() == len(text):
            return values
        value, place = DECODER.raw_decode(text, skipped.end())
        values.append(value)


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
        plain = not form.records and form.key is None and not all(isinstance(v, dict) for v in records.values())
        return [records] if plain else _values(records, form.key)  # a single row, or an object of rows
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
