"""The folder of a build: locked while one is at work, marked with the build's settings, refused to another's."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format import INDEX_NAME, canonical_json, digest
from shards.storage import LocalStorage

BUILD_NAME = "build.json"
OWN_FILES = re.compile(
    r"\d{6}\.(tar|idx\.npy|part\.json)|(index|build|repair)\.json|(rejects|repairs)\.jsonl|\..+\.tmp"
)


class BuildError(ValueError):
    """A build that cannot go on; what is finished stays and is used by the next try."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the kernel drops the lock of a process that was killed."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{out}: another build is at work there; wait for it, or stop it") from None
        yield


def claim(storage: LocalStorage, build: dict[str, Any], overwrite: bool) -> None:
    """Mark the folder as this build's, or refuse another's; remove what a killed build left unfinished."""
    try:
        found = json.loads(storage.read(BUILD_NAME))
    except FileNotFoundError:
        found = {} if storage.size(INDEX_NAME) is not None else build
    except ValueError:
        found = {}
    if digest(found) != digest(build):
        if not overwrite:
            raise BuildError(
                f"{storage.root} was built with other settings: {'; '.join(_differences(found, build)[:5])}; "
                "give --overwrite to build it anew, or choose another --out"
            )
        storage.path(INDEX_NAME).unlink(missing_ok=True)  # first: from here on the dataset is not whole
        for path in Path(storage.root).iterdir():
            if OWN_FILES.fullmatch(path.name):
                path.unlink()
    for path in Path(storage.root).glob(".*.tmp"):
        path.unlink()
    storage.write(BUILD_NAME, canonical_json(build))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: dotted name, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for n in names for line in _differences(old.get(n), new.get(n), f"{path}.{n}".lstrip("."))]
    return [] if digest(old) == digest(new) else [f"{path} was {str(old)[:60]}, is {str(new)[:60]}"]
