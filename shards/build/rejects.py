"""Rows without a sample: their records, how they are counted by kind and by cause, and the budget of each cause."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_VARIABLE = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\b[A-Za-z][\w+.-]*://\S+|\S*[/\\]\S*|\b[\w-]+\.\w{2,4}\b|[-+]?\d[\w.]*"""
)


class Kind(NamedTuple):
    """Rejects with the same reason except for names and numbers: their number, and the first of them."""

    reason: str
    number: int
    first: Mapping[str, Any]

    @property
    def example(self) -> str:
        """The first reject: file, row and full reason."""
        return f"{self.first['file']} row {self.first['row']}: {self.first['reason']}"


def kind_of(reason: str) -> str:
    """A reason without the names, paths and numbers that differ from row to row.

    Example:
        "media: /data/1.png does not exist" -> "media: … does not exist"
    """
    return re.sub(r"…(?:[\s,;x]*…)+", "…", _VARIABLE.sub("…", reason))[:160]


def cause_of(reason: str) -> str:
    """The cause that a reject counts for in the budget: "media", or "values" of the row."""
    return "media" if reason.startswith("media:") else "values"


def kinds(rejects: Iterable[Mapping[str, Any]]) -> list[Kind]:
    """Rejects grouped by kind, the most frequent first."""
    counts, first = Counter[str](), dict[str, Mapping[str, Any]]()
    for reject in rejects:
        kind = kind_of(reject["reason"])
        counts[kind] += 1
        first.setdefault(kind, reject)
    return [Kind(reason, count, first[reason]) for reason, count in counts.most_common()]


def over_budget(rejects: Iterable[Mapping[str, Any]], most: float) -> tuple[str, list[Mapping[str, Any]]] | None:
    """The first cause with more than `most` rejects, and its rejects; None if all are within. Omitted rows are free."""
    by_cause: dict[str, list[Mapping[str, Any]]] = {}
    for reject in rejects:
        if not reject["omitted"]:
            by_cause.setdefault(cause_of(reject["reason"]), []).append(reject)
    return next(((cause, faults) for cause, faults in sorted(by_cause.items()) if len(faults) > most), None)
