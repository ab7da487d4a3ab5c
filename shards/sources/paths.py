"""Names of files that no dataset means, and dotted paths into the values of a row.

A path "meta.id" also goes through lists: "answers.text" is the texts of all answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SYSTEM_NAMES = frozenset({".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini"})


def is_system_file(path: Path) -> bool:
    """Whether an operating system made a file or its folder, such as macOS's `._1.jpg`; no dataset means such files."""
    return any(part in SYSTEM_NAMES or part.startswith("._") for part in path.parts)


def at(values: Any, path: str) -> Any:
    """The value at `path`, None if a part of the path is missing; a name that itself holds the dot takes precedence."""
    if isinstance(values, list):
        return [at(item, path) for item in values]
    if not isinstance(values, Mapping):
        return None
    if path in values:
        return values[path]
    first, _, rest = path.partition(".")
    return at(values[first], rest) if rest and first in values else None


def has(values: Any, path: str) -> bool:
    """Whether a row has a value at `path`; null counts as one."""
    if isinstance(values, list):
        return any(has(item, path) for item in values)
    if not isinstance(values, Mapping):
        return False
    first, _, rest = path.partition(".")
    return path in values or (bool(rest) and first in values and has(values[first], rest))
