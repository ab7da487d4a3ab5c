"""A table joined with other tables: subtitles of a clip, or the path of a file by its id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.catalog import Lookup
from shards.schema import Source
from shards.sources.parquet import SourceError
from shards.sources.paths import at
from shards.sources.tables import Table, open_table


@dataclass(frozen=True, slots=True)
class JoinedTable:
    """A `Table` that adds to each row of `main` a struct per lookup. The looked-up rows are in memory.

    Attributes:
        main: the main table.
        others: per lookup: its settings, its table, and key -> row number.
    """

    main: Table
    others: tuple[tuple[Lookup, Table, dict[Any, int]], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all tables; a change of any of them changes the build."""
        return (*self.main.files, *(file for _, table, _ in self.others for file in table.files))

    @property
    def digests(self) -> tuple[str, ...]:
        """A hash of each file's rows."""
        return (*self.main.digests, *(digest for _, table, _ in self.others for digest in table.digests))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.main)

    def first(self, most: int) -> list[dict[str, Any]]:
        """The first rows of the main table, with all of its columns."""
        return self.main.first(most)

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Row numbers with equal values in a column of the main table."""
        return self.main.groups(column)

    def row_bytes(self, columns: Iterable[str]) -> int:
        """Mean size of these columns of a row of the main table, in bytes."""
        return self.main.row_bytes(_own(columns, [lookup for lookup, _, _ in self.others]))

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Read rows in the given order, each with the matching rows of the lookups or None."""
        names = list(columns)
        joined = self.main.read(rows, _own(names, [lookup for lookup, _, _ in self.others]))
        for lookup, table, numbers in self.others:
            if lookup.column is None:
                places: list[Any] = list(rows)
            else:
                places = [_places(numbers, at(values, lookup.column)) for _, values in joined]
            needed = sorted({number for place in places for number in _as_list(place) if number is not None})
            other_rows = dict(zip(needed, table.read(needed, _of(lookup, names)), strict=True))
            for (_, values), place in zip(joined, places, strict=True):
                matching = [None if number is None else other_rows[number][1] for number in _as_list(place)]
                values[lookup.name] = matching if isinstance(place, list) else matching[0]
        return joined


def open_joined(main: Table, root: Path, lookups: Sequence[Lookup], columns: Iterable[str]) -> Table:
    """Join `main` with its lookups; without lookups it is returned unchanged.

    Raises:
        SourceError: files of a lookup are missing or unreadable, or lack a column.
    """
    wanted, others = list(columns), []
    for lookup in lookups:
        key = [lookup.key] if lookup.key is not None else []
        table = open_table(root, lookup.files, {*key, *_of(lookup, wanted)}, lookup.table)
        numbers: dict[Any, int] = {}
        if lookup.key is None and len(table) != len(main):
            raise SourceError(
                f"{root / lookup.files} has {len(table)} rows for {len(main)} rows; without a key they must be equal"
            )
        for number, (_, values) in enumerate(table.read(range(len(table)), key) if key else ()):
            numbers.setdefault(at(values, key[0]), number)
        others.append((lookup, table, numbers))
    return JoinedTable(main, tuple(others)) if others else main


def _places(numbers: Mapping[Any, int], key: Any) -> Any:
    """Row number of a key, or of every key of a list; None if there is no such row."""
    return [numbers.get(item) for item in key] if isinstance(key, list) else numbers.get(key)


def _as_list(place: Any) -> list[Any]:
    return place if isinstance(place, list) else [place]


def _own(columns: Iterable[str], lookups: Iterable[Lookup]) -> list[str]:
    names = {lookup.name for lookup in lookups}
    return [column for column in columns if column.partition(".")[0] not in names]


def _of(lookup: Lookup, columns: Iterable[str]) -> list[str]:
    return [column.removeprefix(f"{lookup.name}.") for column in columns if column.startswith(f"{lookup.name}.")]
