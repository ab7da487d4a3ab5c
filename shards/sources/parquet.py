"""Parquet files as one table: row counts, single columns, and chosen rows. Nothing is kept in memory for long."""

from __future__ import annotations

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
    """Files in order; rows are numbered through all of them. `counts[i]` is the number of rows of file i."""

    root: Path
    files: tuple[Path, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        """Number of rows."""
        return sum(self.counts)

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        return [value for file in self.files for value in pq.read_table(file, columns=[name])[name].to_pylist()]

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Chosen rows in the order asked for, with where they come from."""
        wanted, found = sorted(set(rows)), {}
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
    counts = []
    for file in files:
        try:
            schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file}: not a readable parquet file ({error}); fetch it again") from None
        missing = sorted(set(columns) - set(schema.names))
        if missing:
            raise SourceError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; "
                "correct `columns` of the catalog row, or fetch the revision that it was written for"
            )
        counts.append(rows)
    return Table(root, files, tuple(counts))


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
            taken = reader.read_row_group(number, columns).take([row - start for row in here]).to_pylist()
            yield from zip(here, taken, strict=True)
        start = end
