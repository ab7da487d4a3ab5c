"""A table whose rows carry what other tables say of them: subtitles of a clip, the path behind an id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.catalog import Lookup
from shards.schema import Source
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
            places = [numbers.get(at(values, lookup.column)) for _, values in found]
            there = sorted({place for place in places if place is not None})
            rest = dict(zip(there, table.read(there, _of(lookup, wanted)), strict=True))
            for (_, values), place in zip(found, places, strict=True):
                values[lookup.name] = None if place is None else rest[place][1]
        return found


def open_joined(main: Table, root: Path, lookups: Sequence[Lookup], columns: Iterable[str]) -> Table:
    """`main` joined with its lookups, or itself where there are none.

    Raises:
        SourceError: files of a lookup that are missing, unreadable, or without a column.
    """
    wanted, others = list(columns), []
    for lookup in lookups:
        table = open_table(root, lookup.files, {lookup.key, *_of(lookup, wanted)}, lookup.table)
        numbers: dict[Any, int] = {}
        for number, (_, values) in enumerate(table.read(range(len(table)), [lookup.key])):
            numbers.setdefault(at(values, lookup.key), number)
        others.append((lookup, table, numbers))
    return JoinedTable(main, tuple(others)) if others else main


def _own(columns: Iterable[str], lookups: Iterable[Lookup]) -> list[str]:
    names = {lookup.name for lookup in lookups}
    return [column for column in columns if column.partition(".")[0] not in names]


def _of(lookup: Lookup, columns: Iterable[str]) -> list[str]:
    return [column.removeprefix(f"{lookup.name}.") for column in columns if column.startswith(f"{lookup.name}.")]
