"""Parquet files as one table: row counts, single columns, and chosen rows. Nothing is kept in memory for long."""

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

from shards.schema import Source


class SourceError(ValueError):
    """A source that is missing, unreadable, or not of the expected layout."""


@dataclass(frozen=True, slots=True)
class Table:
    """Files in order; rows are numbered through all of them.

    Attributes:
        root: the dataset's folder.
        files: paths below it.
        counts: rows of each file.
        footers: sha256 of each file's metadata (sizes and statistics of every chunk): another footer, other rows.
    """

    root: Path
    files: tuple[Path, ...]
    counts: tuple[int, ...]
    footers: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Row numbers with equal values in a column, groups in order of appearance; None: every row is a group."""
        if column is None:
            return [(number,) for number in range(len(self))]
        values = (value for file in self.files for value in pq.read_table(file, columns=[column])[column].to_pylist())
        groups: dict[Any, list[int]] = {}
        for number, value in enumerate(values):
            groups.setdefault(value, []).append(number)
        return [tuple(numbers) for numbers in groups.values()]

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Chosen rows in the order asked for, with where they come from.

        Raises:
            SourceError: a damaged file.
        """
        wanted = sorted(set(rows))
        found: dict[int, tuple[Source, dict[str, Any]]] = {}
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        names = sorted(set(columns))
        for number, file in enumerate(self.files):
            local = [row - int(starts[number]) for row in wanted if starts[number] <= row < starts[number + 1]]
            for row, values in _read_rows(file, local, names):
                source = Source(file=file.relative_to(self.root).as_posix(), row=row)
                found[row + int(starts[number])] = (source, values)
        return [found[row] for row in rows]


def open_table(root: Path, pattern: str, columns: Iterable[str]) -> Table:
    """The files below `root` that match a glob.

    Raises:
        SourceError: no file, an unreadable one, or one without a column; names what is there.
    """
    files = tuple(sorted(root.glob(pattern)))
    if not files:
        raise SourceError(f"{root / pattern}: no such file; download or make the dataset first, or set MOLMO2_DATA")
    counts, footers = [], []
    for file in files:
        try:
            schema, rows, footer = pq.read_schema(file), pq.read_metadata(file).num_rows, _footer(file)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file}: not a readable parquet file ({error}); fetch it again") from None
        missing = sorted(set(columns) - set(schema.names))
        if missing:
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; "
                "correct `columns` of the catalog row, or fetch the revision that it was written for"
            )
        counts.append(rows)
        footers.append(hashlib.sha256(footer).hexdigest())
    return Table(root, files, tuple(counts), tuple(footers))


def _footer(path: Path) -> bytes:
    with open(path, "rb") as file:
        end = file.seek(-8, os.SEEK_END)  # 4 bytes of length, then "PAR1"
        length = int.from_bytes(file.read(4), "little")
        file.seek(end - length)
        return file.read(length)


def _read_rows(file: Path, rows: list[int], columns: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of one file, ascending, reading only the row groups that hold them."""
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
