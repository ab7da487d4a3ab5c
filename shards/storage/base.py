"""The storage interface with seven methods: read, write, create, publish, size, remove, list.

This module holds the protocol, its error, counters for readers, and threads for reads. Backends are local directories
(`local`), buckets (`s3`) and published shards (`web`); another one needs the same seven methods and a line in
`shards.storage.open`. File names are relative, with "/" between parts, and never leave the root.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

AT_ONCE = 48  # concurrent reads of one process; a bucket has a high latency, but serves many reads at once
_TALLY: Counter[str] = Counter()  # the counters of this process since the last `take_tally`
_TALLY_LOCK = threading.Lock()


def tally(name: str, count: int = 1) -> None:
    """Add to a counter of this process's readers: "retries", "cache_hits", "bytes"."""
    with _TALLY_LOCK:
        _TALLY[name] += count


def take_tally() -> dict[str, int]:
    """Return the counters since the last call, and reset them."""
    with _TALLY_LOCK:
        counts = dict(_TALLY)
        _TALLY.clear()
    return counts


def read_threads() -> ThreadPoolExecutor:
    """The thread pool of this process for blocking reads; the threads live as long as the process.

    A thread that ends takes a lock inside OpenSSL (hashing, TLS). A process that is forked at that moment inherits the
    held lock, and its own threads deadlock; this happened when workers started right after a plan was opened.
    """
    return _read_threads(os.getpid())


@functools.lru_cache(maxsize=1)
def _read_threads(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "read")  # threads do not survive a fork, so each process has its own pool


class UnavailableError(OSError):
    """A storage does not answer, refuses, or is gone. This is no damage: the data may be intact."""


class Storage(Protocol):
    """Files below one root, addressed by relative names."""

    root: str

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read bytes [offset, offset + length) of a file, fewer if it is shorter. FileNotFoundError: no such file."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file atomically: a reader sees the old bytes or the new ones."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a file atomically; False if it exists already. Of several concurrent writers exactly one succeeds."""

    def publish(self, path: Path, name: str) -> None:
        """Move a complete local file to `name`, atomically."""

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it is missing."""

    def remove(self, name: str) -> None:
        """Delete a file; a missing file is no error."""

    def list(self, suffix: str = "") -> list[str]:
        """Sorted names of the files below the root that end with `suffix`; temporary files are left out."""
