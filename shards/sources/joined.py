"""A table whose rows carry what other tables say of them: subtitles of a clip, the path behind an id."""

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
    """`main` with a struct per lookup; a `Table` itself. The looked-up rows are in memory.

    Attributes:
        main: the rows.
        others: with each lookup its table and the number of the row of every key.
    """

    main: Table
    others: tuple[tuple[Lookup, Table, dict[Any, int]], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all tables: they decide what is built."""
        return (*self.main.files, *(file for _, table, _ in self.others for file in table.files))

    @property
    def digests(self) -> tuple[str, ...]:
        """A hash of each file's rows."""
        return (*self.main.digests, *(digest for _, table, _ in self.others for digest in table.digests))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.main)

    def groups(self, column: str | None) -> list[tuple[int, ...]]:
        """Row numbers with equal values in a column of the main table."""
        return self.main.groups(column)

    def read(self, rows: Sequence[int], columns: Iterable[str]) -> list[tuple[Source, dict[str, Any]]]:
        """Chosen rows in the order asked for, each with the matching rows of the lookups or None."""
        wanted = list(columns)
        found = self.main.read(rows, _own(wanted, [lookup for lookup, _, _ in self.others]))
        for lookup, table, numbers in self.others:
            if lookup.column is None:
                places: list[Any] = list(rows)
            else:
                places = [_places(numbers, at(values, lookup.column)) for _, values in found]
            there = sorted({place for one in places for place in _each(one) if place is not None})
            rest = dict(zip(there, table.read(there, _of(lookup, wanted)), strict=True))
            for (_, values), place in zip(found, places, strict=True):
                matching = [None if one is None else rest[one][1] for one in _each(place)]
                values[lookup.name] = matching if isinstance(place, list) else matching[0]
        return found


def open_joined(main: Table, root: Path, lookups: Sequence[Lookup], columns: Iterable[str]) -> Table:
    """`main` joined with its lookups, or itself where there are none.

    Raises:
        SourceError: files of a lookup that are missing, unreadable, or without a column.
    """
    wanted, others = list(columns), []
    for lookup in lookups:
        key = [lookup.key] if lookup.key is not None else []
        table = open_table(root, lookup.files, {*key, *_of(lookup, wanted)}, lookup.table)
        numbers: dict[Any, int] = {}
        if lookup.key is None and len(table) != len(main):
            raise SourceError(
                f"{root / lookup.files} has {len(table)} rows for {len(main)} rows; without a key each has one"
            )
        for number, (_, values) in enumerate(table.read(range(len(table)), key) if key else ()):
            numbers.setdefault(at(values, key[0]), number)
        others.append((lookup, table, numbers))
    return JoinedTable(main, tuple(others)) if others else main


def _places(numbers: Mapping[Any, int], wanted: Any) -> Any:
    return [numbers.get(one) for one in wanted] if isinstance(wanted, list) else numbers.get(wanted)


def _each(place: Any) -> list[Any]:
    return place if isinstance(place, list) else [place]


def _own(columns: Iterable[str], lookups: Iterable[Lookup]) -> list[str]:
    names = {lookup.name for lookup in lookups}
    return [column for column in columns if column.partition(".")[0] not in names]


def _of(lookup: Lookup, columns: Iterable[str]) -> list[str]:
    return [column.removeprefix(f"{lookup.name}.") for column in columns if column.startswith(f"{lookup.name}.")]
