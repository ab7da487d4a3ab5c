"""Rows without a sample: their records, how they are counted by kind and by cause, and the budget of each cause."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_VARIABLE = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\b[A-Za-z][\w+.-]*://\S+|\S*[/\\]\S*|\b[\w-]+\.\w{2,4}\b|[-+]?\d[\w.]*"""
)


# what a reason says about a media file -> the kind that a report gives it
_MEDIA_KINDS = (
    (re.compile(r"does not exist|no such image"), "media: the file does not exist"),
    (re.compile(r"lies outside of"), "media: the file lies outside of its folder; `media_roots` of the row allows it"),
    (re.compile(r"the file is empty"), "media: the file is empty"),
    (re.compile(r"truncated|cut short|Truncated"), "media: the file is truncated"),
    (re.compile(r"UnidentifiedImageError"), "media: the file is not an image"),
)


class Kind(NamedTuple):
    """Rejects with the same reason except for names and numbers: the number of their rows, and the first of them."""

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
        "media: /data/1.png does not exist" -> "media: the file does not exist"
        "filter: n is '3', wanted max 2" -> "filter: n is …, wanted max …"
    """
    if reason.startswith("media:"):
        for pattern, kind in _MEDIA_KINDS:
            if pattern.search(reason):
                return kind
    return re.sub(r"…(?:[\s,;x]*…)+", "…", _VARIABLE.sub("…", reason))[:160]


def cause_of(reason: str) -> str:
    """The cause that a reject counts for in the budget: "media", or "values" of the row."""
    return "media" if reason.startswith("media:") else "values"


def kinds(rejects: Iterable[Mapping[str, Any]]) -> list[Kind]:
    """Rejects grouped by kind, the most frequent first."""
    rows, first = dict[str, set[tuple[str, int]]](), dict[str, Mapping[str, Any]]()
    for reject in rejects:
        kind = kind_of(reject["reason"])
        rows.setdefault(kind, set()).add((reject["file"], reject["row"]))  # several items of a row count once
        first.setdefault(kind, reject)
    by_number = sorted(rows, key=lambda kind: -len(rows[kind]))
    return [Kind(kind, len(rows[kind]), first[kind]) for kind in by_number]


def over_budget(rejects: Iterable[Mapping[str, Any]], most: float) -> tuple[str, list[Mapping[str, Any]]] | None:
    """The first cause with more than `most` rejects, and its rejects; None if all are within. Omitted rows are free."""
    by_cause: dict[str, list[Mapping[str, Any]]] = {}
    for reject in rejects:
        if not reject["omitted"]:
            by_cause.setdefault(cause_of(reject["reason"]), []).append(reject)
    return next(((cause, faults) for cause, faults in sorted(by_cause.items()) if len(faults) > most), None)
