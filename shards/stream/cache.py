"""A disk cache of whole shards of small datasets: one read from a bucket per shard instead of one per sample and epoch.

A run caches a dataset only if all of it fits the budget, so that its own shards never evict each other. Processes and
runs share the folder. No process waits: while one fetches a shard, the others read ranges from the bucket, and so does
the process itself if the shard is large. Cached bytes are verified like any other read.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from shards.atomic import LockHeldError, file_lock, remove_temporary_files, replacing
from shards.storage.base import Storage, UnavailableError, tally
from shards.storage.local import LocalStorage, cache_dir
from shards.stream.dataset import Dataset, Tars

LOG = logging.getLogger(__name__)
IDLE = 600.0  # seconds without a read after which a shard may be evicted
AGAIN = 60.0  # seconds until a process retries to cache a shard for which there was no room
CHUNK = 8 << 20  # bytes of one read while a shard is fetched
SMALL_SHARD = 16 << 20  # bytes; a sample waits for the fetch of such a shard, which takes as long as a few requests
_UNDER_WAY: set[Path] = set()  # large shards that this process is fetching
_NOT_BEFORE: dict[Path, float] = {}  # shards that this process could not cache -> monotonic time of the next try


@dataclass(frozen=True, slots=True)
class ShardCache:
    """A folder of at most `budget` bytes that holds whole shards, named by their SHA-256."""

    folder: Path
    budget: int

    def read(self, storage: Storage, name: str, size: int, sha256: str, offset: int, length: int) -> bytes:
        """Read a range of a shard: from the folder if the shard is cached or can be cached now, else from `storage`."""
        path = self._path(sha256)
        keep = self._keep if size <= SMALL_SHARD else self._keep_meanwhile
        if not path.exists() and not keep(storage, name, size, path):
            return storage.read(name, offset, length)
        try:
            data = LocalStorage(self.folder).read(path.name, offset, length)
            os.utime(path)  # marks the shard as in use
        except OSError:  # another run evicted it, or the disk of the cache fails
            return storage.read(name, offset, length)
        tally("cache_hits")
        return data

    def has(self, sha256: str) -> bool:
        """Whether a shard is cached."""
        return self._path(sha256).exists()

    def forget(self, sha256: str) -> None:
        """Remove a shard whose cached bytes were wrong."""
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _keep_meanwhile(self, storage: Storage, name: str, size: int, path: Path) -> bool:
        """Begin to cache a shard in a thread; False, since it is not there yet."""
        if path in _UNDER_WAY:
            return False
        _UNDER_WAY.add(path)

        def keep() -> None:
            try:
                self._keep(storage, name, size, path)
            except UnavailableError as error:  # the reads of samples meet the same storage, and end the run
                LOG.warning("%s: not cached: %s", path, error)
            finally:
                _UNDER_WAY.discard(path)

        _fetcher(os.getpid()).submit(keep)
        return False

    def _keep(self, storage: Storage, name: str, size: int, path: Path) -> bool:
        """Cache a shard; False if another process is fetching, there is no room, or the bytes are wrong."""
        if time.monotonic() < _NOT_BEFORE.get(path, 0.0):
            return False
        try:
            with file_lock(self.folder / ".lock"):
                remove_temporary_files(self.folder)
                cached = path.exists() or (self._make_room(size) and _fetch(storage, name, size, path))
        except LockHeldError:
            return False
        except UnavailableError:
            raise
        except OSError as error:  # the cache's disk failed; if it was the storage, the read that follows fails alike
            LOG.warning("%s: not cached: %s", path, error)
            cached = False
        if not cached:
            _NOT_BEFORE[path] = time.monotonic() + AGAIN
        return cached

    def _make_room(self, size: int) -> bool:
        """Evict shards that are not in use, least recently used first; False if that does not make enough room."""
        shards = []
        for file in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # `forget` takes no lock
                shards.append((file.stat().st_mtime, file.stat().st_size, file))
        shards.sort()
        excess = sum(file_size for _, file_size, _ in shards) + size - self.budget
        for used, file_size, file in shards:
            if excess <= 0 or time.time() - used < IDLE:
                break
            file.unlink(missing_ok=True)
            excess -= file_size
        return excess <= 0


def with_cache(datasets: Iterable[Dataset], budget: int) -> list[Tars]:
    """The `Tars` of each dataset. The smallest remote datasets, as many as fit the budget together, get the cache."""
    datasets = list(datasets)
    sizes = {dataset.name: sum(shard.bytes for shard in dataset.index.shards) for dataset in datasets}
    kept, left = set(), budget
    for dataset in sorted(datasets, key=lambda dataset: (sizes[dataset.name], dataset.name)):
        if not isinstance(dataset.storage, LocalStorage) and sizes[dataset.name] <= left:
            kept.add(dataset.name)
            left -= sizes[dataset.name]
    cache = ShardCache(cache_dir() / "shards", budget)

    def tars(dataset: Dataset) -> Tars:
        if dataset.name not in kept:
            return dataset.tars
        whole = tuple((shard.bytes, shard.sha256) for shard in dataset.index.shards)
        return replace(dataset.tars, cache=cache, whole=whole)

    return [tars(dataset) for dataset in datasets]


@functools.lru_cache(maxsize=1)
def _fetcher(pid: int) -> ThreadPoolExecutor:
    """The thread of this process that fetches large shards, one after another; it does not survive a fork."""
    return ThreadPoolExecutor(1, "fetch")


class _WrongBytesError(Exception):
    """The bytes of a shard do not have the SHA-256 of the index."""


def _fetch(storage: Storage, name: str, size: int, path: Path) -> bool:
    """Copy a shard to the folder; False if its SHA-256 is not the index's (its samples' checksums will report that)."""
    digest = hashlib.sha256()
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            for offset in range(0, size, CHUNK):
                data = storage.read(name, offset, min(CHUNK, size - offset))
                digest.update(data)
                file.write(data)
            if digest.hexdigest() != path.stem:
                raise _WrongBytesError
    except _WrongBytesError:
        return False
    return True
