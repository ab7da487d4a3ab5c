"""Parsing JSON such that a key that occurs twice in an object is seen: `json.loads` silently keeps the last value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DuplicateKey:
    """Stands for the value of a key that occurs several times in an object, with different values."""

    key: str


def parse_json(text: str | bytes) -> Any:
    """Parse a document; a key with several different values gets a `DuplicateKey` as its value.

    Raises:
        ValueError: the text is not JSON.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if value != values[key]:
                values[key] = DuplicateKey(key)
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # for texts of several documents


def first_bad_line(lines: Iterable[bytes], skip: int, kind: type) -> str | None:
    """The number (from 1) of the first of some JSON lines that is broken or not of a kind, and why; None: no such line.

    If the first line with text is no JSON value by itself, the text is not JSON lines but one document: also None.

    Args:
        lines: UTF-8 text by lines.
        skip: number of lines before the first value.
        kind: `dict` or `list`.
    """
    begun = False
    for number, line in enumerate(lines, 1):
        if number <= skip or not line.strip():
            continue
        try:
            value = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            return f"line {number}: {str(error).replace('line 1 column', 'column')}" if begun else None
        if not isinstance(value, kind):
            expected = "an object with columns" if kind is dict else "a list of values"
            return f"line {number}: expected {expected}, found {type(value).__name__}" if begun else None
        begun = True
    return None
