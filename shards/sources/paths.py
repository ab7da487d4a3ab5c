"""Spellings of the names of files, names that no dataset means, and dotted paths into the values of a row.

A path "meta.id" also goes through lists: "answers.text" is the texts of all answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

# Names at the top of a raw folder that the downloader and the Hub's client use, in lower case.
OWN_NAMES = frozenset({".download", ".cache", ".unpacking", "manifest.json", "failures.jsonl"})
_FETCHED = re.compile(r"media/[0-9a-f]{2}/[0-9a-f]{64}")
SYSTEM_NAMES = frozenset({".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini"})


def is_system_file(path: Path) -> bool:
    """Whether an operating system made a file or its folder, such as macOS's `._1.jpg`; no dataset means such files."""
    return any(part in SYSTEM_NAMES or part.startswith("._") for part in path.parts)


def own_file(path: PurePath) -> bool:
    """Whether a path in a raw folder belongs to the downloader: its state, its manifest, or an image behind a URL."""
    lowered = path.as_posix().lower()
    return lowered.partition("/")[0] in OWN_NAMES or _FETCHED.fullmatch(lowered) is not None


def inside(path: str) -> str:
    """Check that a path leads to a place below the folder that it is relative to, whatever that folder holds.

    Raises:
        ValueError: the path is empty, absolute, leads upwards, or holds a backslash or a zero byte.
    """
    parts = PurePath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leads outside of its folder; give one below it, without '..' and backslashes")
    return path


def spellings(folder: Path, name: str) -> Iterator[Path]:
    """Yield the path of a name below `folder`, as is or as other systems write it (backslashes, percent-encoding).

    A table may have been written on another system than its files. Only the first path that exists is yielded.
    """
    names = dict.fromkeys([name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/")])
    for spelled in names:
        if "\0" not in spelled and (path := _existing(folder, spelled)) is not None:
            yield path
            return


def _existing(folder: Path, name: str) -> Path | None:
    """The path of a name below `folder` if it exists; each of its parts may be in another Unicode form on the disk."""
    if (path := folder / name).exists():
        return path
    if name.isascii():
        return None
    path = folder
    for part in Path(name).parts:
        forms = dict.fromkeys([part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))])
        existing = next((path / form for form in forms if (path / form).exists()), None)
        if existing is None:
            return None
        path = existing
    return path


def is_downloaded(file: Path) -> bool:
    """Whether a file lies in a folder that the downloader has filled, so that it can be fetched again."""
    return any((folder / "manifest.json").is_file() for folder in file.parents)


def remedy(file: Path) -> str:
    """What to do about a broken file of rows."""
    return "fetch it again" if is_downloaded(file) else "correct it, or write it again"


def column_remedy(file: Path) -> str:
    """What to do about a file that lacks a column."""
    known = ", or fetch the revision that it was written for" if is_downloaded(file) else ""
    return f"correct `columns` of the catalog row{known}"


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
