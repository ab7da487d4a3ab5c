"""The place of a build: locked while one is at work, marked with the build's settings, refused to another's.

A build of the whole dataset has a folder to itself. Builds of a share of it have it together: files appear whole,
under names that are their own, and removing is left to the build of the whole. A bucket knows no lock: builds with the
same settings make the same bytes, and others are told by the mark, before and after.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format import INDEX_NAME, canonical_json, digest
from shards.storage.base import Storage
from shards.storage.local import LocalStorage

BUILD_NAME = "build.json"
OWN_FILES = re.compile(
    r"\d{6}\.(tar|idx\.npy|part\.json|failed\.json)|(index|build|repair|report)\.json|(rejects|repairs)\.jsonl|\..+\.tmp"
)


class BuildError(ValueError):
    """A build that cannot go on; what is finished stays and is used by the next try."""


@contextmanager
def locked(storage: Storage, *, shared: bool = False) -> Iterator[None]:
    """Keep other builds out of a folder, or only those of the whole; the kernel drops a killed process's lock."""
    if not isinstance(storage, LocalStorage):
        yield
        return
    out = Path(storage.root)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{out}: another build is at work there; wait for it, or stop it") from None
        yield


def claim(storage: Storage, build: dict[str, Any], overwrite: bool) -> None:
    """Mark the place as this build's, or refuse another's; remove what a killed build left unfinished."""
    found = _mark(storage, build)
    if digest(found) != digest(build):
        if not overwrite:
            raise _other_build(storage, found, build)
        storage.remove(INDEX_NAME)  # first: from here on the dataset is not whole
        for name in storage.list():
            if OWN_FILES.fullmatch(name):
                storage.remove(name)
    if isinstance(storage, LocalStorage):
        for path in Path(storage.root).glob(".*.tmp"):
            path.unlink()
    storage.write(BUILD_NAME, canonical_json(build))


def join(storage: Storage, build: dict[str, Any]) -> None:
    """Mark the place beside others that do the same at this moment: the first decides, all must have its settings."""
    found = _mark(storage, build)
    if digest(found) == digest(build):
        storage.create(BUILD_NAME, canonical_json(build))
        found = _mark(storage, build)
    if digest(found) != digest(build):
        raise _other_build(storage, found, build)


def check_mark(storage: Storage, build: dict[str, Any]) -> None:
    """Refuse when another build has overwritten the mark meanwhile, which can happen in a bucket."""
    found = _mark(storage, build)
    if digest(found) != digest(build):
        raise _other_build(storage, found, build)


def _mark(storage: Storage, build: dict[str, Any]) -> Any:
    """The settings that the place is marked with; `build` where it is nobody's yet."""
    try:
        return json.loads(storage.read(BUILD_NAME))
    except FileNotFoundError:
        return {} if storage.size(INDEX_NAME) is not None else build
    except ValueError:
        return {}


def _other_build(storage: Storage, found: Any, build: dict[str, Any]) -> BuildError:
    return BuildError(
        f"{storage.root} was built with other settings: {'; '.join(_differences(found, build)[:5])}; "
        "give --overwrite (without --task) to build it anew, or choose another --out"
    )


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: dotted name, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for n in names for line in _differences(old.get(n), new.get(n), f"{path}.{n}".lstrip("."))]
    return [] if digest(old) == digest(new) else [f"{path} was {str(old)[:60]}, is {str(new)[:60]}"]
