"""The sidecars of a dataset as arrays: verified once per machine, and memory-mapped.

The first process on a machine that opens a dataset hashes its sidecars and remembers each by size, times and digest in
the cache folder; later ones, and ranks that start at the same time, map the files without reading them. A file of which
any of the three has changed is hashed again. Sidecars from a bucket are first copied to the cache folder.
`tools/verify_shards.py` reads every byte and uses no memory of earlier runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.atomic import file_lock, write_atomic
from shards.format import DatasetIndex, FormatError, ShardInfo, check_sidecar, index_dtype, npy_rows
from shards.storage.base import Storage
from shards.storage.local import LocalStorage, cache_dir

Array = npt.NDArray[Any]
Facts = list[Any]  # size in bytes, times of the last change of content and of the file (ns), and SHA-256
# Seconds. A file that changed so recently may change once more within one tick of the file system's clock, so it is not
# remembered.
RECENT = 2.0
THREADS = 4  # threads that hash the sidecars of one dataset


def load_sidecars(storage: Storage, index: DatasetIndex) -> tuple[Array, ...]:
    """The rows of every shard, one read-only array per sidecar.

    Raises:
        FormatError: a sidecar is missing, or is not the one that the index names.
    """
    known = _Known(storage.root)
    if not all(known.has(_local(storage, shard), shard.index_sha256) for shard in index.shards):
        # The caller may itself run in one of `read_threads`, and would wait for ever for another of them.
        with known.updating(), ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(lambda shard: _verify(storage, shard, known), index.shards):
                pass
    return tuple(_map(storage, shard, index.num_variants) for shard in index.shards)


class _Known:
    """The sidecars of one dataset that were verified on this machine, in a file of the cache folder."""

    def __init__(self, root: str) -> None:
        where = root if "://" in root else os.path.realpath(root)
        self.file = cache_dir() / "verified" / f"{hashlib.sha256(where.encode()).hexdigest()[:32]}.json"
        self.facts = self._read()

    def has(self, path: Path, sha256: str) -> bool:
        """Whether a file with this digest was verified and has not changed since."""
        return path.name in self.facts and self.facts[path.name] == _facts(path, sha256)

    def add(self, path: Path, sha256: str) -> None:
        """Remember a verified file."""
        facts = _facts(path, sha256)
        if facts is not None and time.time() - max(facts[1:3]) / 1e9 > RECENT:
            self.facts[path.name] = facts

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Only one process verifies a dataset; the others wait for what it finds. Without a cache folder each does."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(file_lock(self.file.with_suffix(".lock"), wait=True))
            self.facts = self._read()
            before = dict(self.facts)
            yield
            if self.facts != before:
                with contextlib.suppress(OSError):  # the next process verifies again
                    write_atomic(self.file, json.dumps(self.facts))

    def _read(self) -> dict[str, Facts]:
        try:
            found = json.loads(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _facts(path: Path, sha256: str) -> Facts | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, sha256]


def _local(storage: Storage, shard: ShardInfo) -> Path:
    """The local file of a sidecar; that of one from a bucket, in the cache folder, is named by its digest."""
    if isinstance(storage, LocalStorage):
        return storage.path(f"{shard.name}.idx.npy")
    return cache_dir() / f"{shard.index_sha256}.npy"


def _verify(storage: Storage, shard: ShardInfo, known: _Known) -> None:
    """Hash a sidecar, and fetch it if it is not on this machine yet; bytes with a wrong hash are not kept."""
    path, name = _local(storage, shard), f"{shard.name}.idx.npy"
    if known.has(path, shard.index_sha256):
        return
    digest = _sha256(path)
    if digest != shard.index_sha256 and not isinstance(storage, LocalStorage):
        try:
            data = storage.read(name)
        except FileNotFoundError as error:
            raise _unusable(storage, shard, error) from None
        digest = hashlib.sha256(data).hexdigest()
        if digest == shard.index_sha256:
            LocalStorage(path.parent).write(path.name, data)
    if digest != shard.index_sha256:
        found = "no such file" if digest is None else f"sha256 {digest[:16]}..."
        raise _unusable(storage, shard, f"{found}, index.json says {shard.index_sha256[:16]}...")
    known.add(path, shard.index_sha256)


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _map(storage: Storage, shard: ShardInfo, num_variants: int) -> Array:
    """Map a sidecar. Arrow keeps the mapping and closes the file, so that many shards need no open files."""
    dtype = index_dtype(num_variants)
    try:
        with pa.memory_map(str(_local(storage, shard))) as file:
            data = memoryview(file.read_buffer())
        start, count = npy_rows(data, dtype)
    except (OSError, ValueError) as error:
        raise _unusable(storage, shard, error) from None
    rows = np.frombuffer(data, dtype, count, start)
    check_sidecar(rows, shard, num_variants, f"{storage.root}/{shard.name}.idx.npy")
    return rows


def _unusable(storage: Storage, shard: ShardInfo, reason: object) -> FormatError:
    return FormatError(
        f"{storage.root}/{shard.name}.idx.npy: cannot be used: {reason}; run tools/verify_shards.py, and fetch or "
        "build it again; where memory cannot be allocated, raise the limit vm.max_map_count (one mapping a shard)"
    )
