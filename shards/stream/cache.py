"""Shards of tiny samples kept whole on the local disk: one read from a bucket instead of one for every sample.

A run keeps a dataset if all of it fits the budget, so that nothing the plan needs ever makes room for something else.
Processes and runs share the folder. Nobody waits: while one process fetches, the others read ranges. What lies here
is checked like every other read; images and frames are not kept, their ranges are long enough.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shards.storage.base import Storage, tally
from shards.storage.local import LocalStorage

IDLE = 600.0  # seconds without a read after which a shard may make room for one of another run
AGAIN = 60.0  # seconds until a process tries again to keep a shard for which there was no room
CHUNK = 8 << 20
_NOT_BEFORE: dict[Path, float] = {}  # of this process: shards that could not be kept


def cache_dir() -> Path:
    """Where copies from a bucket are kept, by their hash: `$XDG_CACHE_HOME/nanomolmo2` (default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanomolmo2")


@dataclass(frozen=True, slots=True)
class ShardCache:
    """A folder of whole shards, named by their SHA-256, of `budget` bytes at most."""

    folder: Path
    budget: int

    def read(self, storage: Storage, name: str, size: int, sha256: str, offset: int, length: int) -> bytes:
        """A range of a shard, from the folder if the shard is there or can be brought there now."""
        path = self.folder / f"{sha256}.tar"
        if not path.exists() and not self._keep(storage, name, size, path):
            return storage.read(name, offset, length)
        try:
            data = LocalStorage(self.folder).read(path.name, offset, length)
            os.utime(path)  # in use
        except FileNotFoundError:  # another run has made room
            return storage.read(name, offset, length)
        tally("cache_hits")
        return data

    def forget(self, sha256: str) -> None:
        """Remove a shard that gave wrong bytes."""
        (self.folder / f"{sha256}.tar").unlink(missing_ok=True)

    def _keep(self, storage: Storage, name: str, size: int, path: Path) -> bool:
        """Bring a shard here, unless another process is at it, there is no room, or it is not the right one."""
        if time.monotonic() < _NOT_BEFORE.get(path, 0.0):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given up by the system when a process is killed
            except BlockingIOError:
                return False
            for stale in self.folder.glob(".*.tmp"):  # of a process that was killed
                stale.unlink()
            kept = path.exists() or (self._make_room(size) and _fetch(storage, name, size, path))
        if not kept:
            _NOT_BEFORE[path] = time.monotonic() + AGAIN
        return kept

    def _make_room(self, size: int) -> bool:
        """Remove shards, the longest unused first, but none in use; False where that is not enough."""
        found = []
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # `forget` takes no lock
                found.append((file.stat().st_mtime, file.stat().st_size, file))
        found.sort()
        excess = sum(each for _, each, _ in found) + size - self.budget
        for used, each, file in found:
            if excess <= 0 or time.time() - used < IDLE:
                break
            file.unlink(missing_ok=True)
            excess -= each
        return excess <= 0


def _fetch(storage: Storage, name: str, size: int, path: Path) -> bool:
    """Copy a shard; False where it is not the one that the index names, which its samples' checksums will tell."""
    temporary, digest = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp"), hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for offset in range(0, size, CHUNK):
                data = storage.read(name, offset, min(CHUNK, size - offset))
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != path.stem:
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
