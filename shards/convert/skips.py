"""Rows that are known to be bad: the catalog row lists them in `skip`, or names a published table that does.

A row is compared by the columns of the entry. Numbers count as equal if they agree to a thousandth: a table may hold
them as float32, another one as text of a few digits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shards.catalog import Row, Skip
from shards.sources.paths import at
from shards.sources.tables import open_table

Item = tuple[Any, ...]


def skip_reason(row: Row, raw: Path, values: dict[str, Any]) -> str:
    """The reason why `skip` of the catalog leaves out a row with these values; "" if it does not.

    Raises:
        SourceError: the files of an entry are missing or unreadable.
    """
    for skip in row.skip:
        item = tuple(_comparable(at(values, column)) for column in skip.columns)
        if item in skipped_items(skip, raw):
            return _reason(skip, item)
    return ""


def unmatched_skips(row: Row, raw: Path, reasons: Iterable[str]) -> list[str]:
    """The items of `skip` that are the reason of no row: the published data no longer hold them, or never did."""
    given = set(reasons)
    all_reasons = (_reason(skip, item) for skip in row.skip for item in sorted(skipped_items(skip, raw), key=repr))
    return [reason for reason in all_reasons if reason not in given]


@functools.lru_cache(maxsize=8)
def skipped_items(skip: Skip, raw: Path) -> frozenset[Item]:
    """The items of an entry, from the catalog and from its files below the raw folder, in their comparable form.

    Raises:
        SourceError: the files are missing or unreadable.
    """
    items = [tuple(map(_comparable, item)) for item in skip.items]
    if skip.files:
        columns = {column for value in skip.values for column in ([value] if isinstance(value, str) else value)}
        table = open_table(raw, skip.files, columns, skip.table)
        for _, values in table.read(range(len(table)), columns):
            items.append(tuple(_listed(values, value) for value in skip.values))
    return frozenset(items)


def _listed(values: dict[str, Any], value: str | tuple[str, ...]) -> Any:
    return _comparable(at(values, value) if isinstance(value, str) else [at(values, column) for column in value])


def _comparable(value: Any) -> Any:
    """A hashable form of a value, equal for values that count as the same."""
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return round(float(value), 3)
    return str(value) if isinstance(value, dict) else value


def _reason(skip: Skip, item: Item) -> str:
    found = ", ".join(f"{column} is {value!r}" for column, value in zip(skip.columns, item, strict=True))
    return f"skipped: {found}; source: {skip.source}"
