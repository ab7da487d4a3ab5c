"""Parsing JSON such that a key that occurs twice in an object is seen: `json.loads` silently keeps the last value."""

from __future__ import annotations

import json
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
