"""Ownership of a build's output: it is locked during the build, and marked with the build's settings.

A build of the whole dataset locks its folder exclusively. Builds of a part of it (task r/N) hold a shared lock: each
writes its own files atomically, and only a build of the whole dataset removes files. A bucket has no lock: builds with
equal settings write equal bytes, and a build with other settings is detected by the mark, which is checked before and
after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.atomic import LockHeldError, file_lock, remove_temporary_files
from shards.format import INDEX_NAME, canonical_json, digest
from shards.storage.base import Storage
from shards.storage.local import LocalStorage

BUILD_NAME = "build.json"
OWN_FILES = re.compile(
    r"\d{6}\.(tar|idx\.npy|part\.json|failed\.json)|(index|build|repair|report)\.json|(rejects|repairs)\.jsonl|\..+\.tmp"
)


class BuildError(ValueError):
    """A build cannot continue; finished shards are kept, and the next run uses them."""


@contextmanager
def locked(storage: Storage, *, shared: bool = False) -> Iterator[None]:
    """Lock a folder against other builds (`shared`: only against builds of the whole); the kernel frees a dead lock."""
    if not isinstance(storage, LocalStorage):
        yield
        return
    try:
        with file_lock(Path(storage.root, ".lock"), shared=shared):
            yield
    except LockHeldError:
        raise BuildError(f"{storage.root}: another build is at work there; wait for it, or stop it") from None


def without_tables(build: Any) -> Any:
    """The settings of a build without the hashes of its tables."""
    return {name: value for name, value in build.items() if name != "files"} if isinstance(build, dict) else build


def claim(storage: Storage, build: dict[str, Any], num_shards: int, overwrite: bool) -> None:
    """Mark the output as this build's and remove temporary files of a killed one.

    If only the tables have changed, the shards stay (the builder compares their rows), but none from `num_shards` on.

    Raises:
        BuildError: the output belongs to a build with other settings, and not `overwrite`.
    """
    mark = _mark(storage, build)
    if digest(mark) != digest(build):
        same_settings = digest(without_tables(mark)) == digest(without_tables(build))
        if not overwrite and not same_settings:
            raise _other_build(storage, mark, build)
        storage.remove(INDEX_NAME)  # first, because the dataset is incomplete from here on
        for name in storage.list():
            shard = re.match(r"\d{6}(?=\.)", name)
            stays = same_settings and not overwrite and shard and int(shard[0]) < num_shards
            if OWN_FILES.fullmatch(name) and not stays:
                storage.remove(name)
    if isinstance(storage, LocalStorage):
        remove_temporary_files(Path(storage.root))
    storage.write(BUILD_NAME, canonical_json(build))


def join(storage: Storage, build: dict[str, Any]) -> None:
    """Mark the output concurrently with other runs of the same build: the first one writes the mark.

    Raises:
        BuildError: the mark has other settings.
    """
    mark = _mark(storage, build)
    if digest(mark) == digest(build):
        storage.create(BUILD_NAME, canonical_json(build))
        mark = _mark(storage, build)
    if digest(mark) != digest(build):
        raise _other_build(storage, mark, build)


def check_mark(storage: Storage, build: dict[str, Any]) -> None:
    """Raise a `BuildError` if another build has overwritten the mark, which can happen in a bucket."""
    mark = _mark(storage, build)
    if digest(mark) != digest(build):
        raise _other_build(storage, mark, build)


def _mark(storage: Storage, build: dict[str, Any]) -> Any:
    """The settings in the mark; `build` if the output is empty."""
    try:
        return json.loads(storage.read(BUILD_NAME))
    except FileNotFoundError:
        return {} if storage.size(INDEX_NAME) is not None else build
    except ValueError:
        return {}


def _other_build(storage: Storage, mark: Any, build: dict[str, Any]) -> BuildError:
    remedy = "give --overwrite (without --task) to build it again, or choose another --out"
    if digest(without_tables(mark)) == digest(without_tables(build)):
        remedy = "run it once without --task: shards whose rows are unchanged are kept"
    return BuildError(
        f"{storage.root} was built with other settings: {'; '.join(_differences(mark, build)[:5])}; {remedy}"
    )


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences of two JSON values, a line each: dotted name, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for n in names for line in _differences(old.get(n), new.get(n), f"{path}.{n}".lstrip("."))]
    return [] if digest(old) == digest(new) else [f"{path} was {str(old)[:60]}, is {str(new)[:60]}"]
