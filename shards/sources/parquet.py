"""Parquet files as one table: row counts, single columns, and selected rows. Rows are not cached in memory."""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.format import canonical_json
from shards.schema import Source
from shards.sources.paths import at, column_remedy, remedy

MAX_BATCH = 1024  # rows that are read at a time
BATCH_BYTES = 64 << 20  # bytes that are read at a time, unless one row is larger
VALUE_BYTES = 8  # least memory of a value in a list, which a file may store in much less than a bit
MAX_VALUES = 1 << 26  # values of a column of lists in one row group, since any of its rows may hold all of them
MAX_ROWS = 1 << 25  # rows of a table; their numbers alone take 3 GB


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

    def first(self, most: int) -> list[dict[str, Any]]:
        """The first rows of the table, with all columns."""
        rows = range(min(most, len(self)))
        return [values for _, values in self.read(rows, pq.read_schema(self.files[0]).names)]

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Group row numbers by the value of a column, in order of first appearance; None: each row is a group."""
        if column is None:
            return [(number,) for number in range(len(self))]
        root = column.partition(".")[0]
        try:
            return numbers_by_value(at(row, column) for file in self.files for row in _all_rows(file, root))
        except (pa.ArrowException, OSError) as error:
            reason = f"column {column} cannot be read ({error}); {remedy(self.files[0])}"
            raise SourceError(f"{self.root}: {reason}") from None

    def row_bytes(self, columns: Iterable[str]) -> int:
        """Mean size of these columns of a row, in bytes, in the row group where it is largest."""
        roots = {path.partition(".")[0] for path in columns}
        return max((_row_bytes(pq.read_metadata(file), roots) for file in self.files), default=0)

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
            raise SourceError(f"{file}: not a readable parquet file ({error}); {remedy(file)}") from None
        missing = [path for path in wanted if not _has(schema, path)]
        if missing:
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; {column_remedy(file)}"
            )
        counts.append(rows)
        footers.append(hashlib.sha256(footer).hexdigest())
    if sum(counts) > MAX_ROWS:
        raise SourceError(f"{root}: {sum(counts)} rows, at most {MAX_ROWS} are read; make several datasets of them")
    return ParquetTable(root, files, tuple(counts), tuple(footers))


def _check_values(file: Path, metadata: Any, number: int, roots: set[str]) -> None:
    """Raise a `SourceError` if these columns of a row group need more memory than a build should have."""
    group = metadata.row_group(number)
    for chunk in _chunks(group, roots):
        if chunk.num_values > max(group.num_rows, MAX_VALUES):
            raise SourceError(
                f"{file}: row group {number}: column {chunk.path_in_schema} has {chunk.num_values} values in "
                f"{group.num_rows} rows, at most {MAX_VALUES} are read; write it in smaller row groups"
            )


def _chunks(group: Any, roots: set[str]) -> list[Any]:
    """The chunks of a row group that belong to these columns."""
    chunks = [group.column(place) for place in range(group.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in roots]


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


def _all_rows(file: Path, column: str) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(file) as reader:
        for number in range(reader.num_row_groups):
            _check_values(file, reader.metadata, number, {column})
        for batch in reader.iter_batches(MAX_BATCH, columns=[column]):
            yield from batch.to_pylist()


def _row_bytes(metadata: Any, roots: set[str]) -> int:
    sizes = [0]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = _chunks(group, roots)
        total = sum(max(chunk.total_uncompressed_size, VALUE_BYTES * chunk.num_values) for chunk in chunks)
        sizes.append(total // max(group.num_rows, 1))
    return max(sizes)


class _RowGroup:
    """One row group, read in batches. Ascending calls of `read` continue where the last one ended."""

    def __init__(self, file: Path, number: int, columns: tuple[str, ...]) -> None:
        self.reader, self.number, self.columns = pq.ParquetFile(file), number, list(columns)
        _check_values(file, self.reader.metadata, number, set(columns))
        size = _row_bytes(self.reader.metadata, set(columns))
        self.batch_size = max(1, min(MAX_BATCH, BATCH_BYTES // max(size, 1)))
        self._restart()

    def _restart(self) -> None:
        self.batches = self.reader.iter_batches(self.batch_size, row_groups=[self.number], columns=self.columns)
        self.start, self.batch = 0, None

    def read(self, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield ascending rows, counted from the start of the row group, each with its number."""
        place = 0
        while place < len(rows):
            try:
                batch = self._batch_with(rows[place])
            except pa.ArrowException:
                if self.batch_size == 1:
                    raise
                # A dictionary makes a batch larger than the file says; a single row fits.
                self.batch_size = 1
                self._restart()
                continue
            ends = bisect.bisect_left(rows, self.start + batch.num_rows, place)
            here = rows[place:ends]
            yield from zip(here, batch.take([row - self.start for row in here]).to_pylist(), strict=True)
            place = ends

    def _batch_with(self, row: int) -> pa.RecordBatch:
        if row < self.start:
            self._restart()
        while self.batch is None or row >= self.start + self.batch.num_rows:
            self.start += 0 if self.batch is None else self.batch.num_rows
            self.batch = None  # its memory is freed before the next one is read
            self.batch = next(self.batches)
        return self.batch


@functools.lru_cache(maxsize=1)
def _row_group(file: Path, version: tuple[int, int], number: int, columns: tuple[str, ...]) -> _RowGroup:
    """The row group that was read last, so that the next shard of the same process continues there."""
    return _RowGroup(file, number, columns)


def _read_rows(file: Path, rows: list[int], columns: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Read ascending rows of one file; only the row groups that hold them are read, in batches of bounded memory."""
    if not rows:
        return
    status, metadata = file.stat(), pq.read_metadata(file)
    start, place = 0, 0
    for number in range(metadata.num_row_groups):
        end = start + metadata.row_group(number).num_rows
        here = []
        while place < len(rows) and rows[place] < end:
            here.append(rows[place])
            place += 1
        if here:
            try:
                group = _row_group(file, (status.st_size, status.st_mtime_ns), number, tuple(columns))
                for row, values in group.read([row - start for row in here]):
                    yield row + start, values
            except (pa.ArrowException, OSError, StopIteration) as error:
                _row_group.cache_clear()
                raise SourceError(f"{file}: row group {number} is damaged ({error}); fetch the file again") from None
        start = end
