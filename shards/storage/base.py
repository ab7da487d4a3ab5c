"""Seven verbs over a place where files lie: read, write, create, publish, size, remove, list.

What every kind of place shares: the protocol, its error, the counts of what readers met, and threads for reads. Local
directories are `shards.storage.local`, buckets `shards.storage.s3`; another kind needs the same seven methods and a
line in `shards.storage.open`. Names are relative, with "/" between parts, and never leave the root.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

AT_ONCE = 48  # reads of one process: a bucket answers late, but many at once
_TALLY: Counter[str] = Counter()
_TALLY_LOCK = threading.Lock()


def tally(name: str, count: int = 1) -> None:
    """Count something that readers of this process met: "retries", "cache_hits", "bytes"."""
    with _TALLY_LOCK:
        _TALLY[name] += count


def take_tally() -> dict[str, int]:
    """What was counted since the last call."""
    with _TALLY_LOCK:
        found = dict(_TALLY)
        _TALLY.clear()
    return found


def read_threads() -> ThreadPoolExecutor:
    """This process's threads for reads that wait; they last as long as the process.

    A thread that ends takes a lock inside OpenSSL (hashing, TLS). A process that is forked at that moment inherits the
    lock taken, and its own threads wait for ever: seen when workers started right after a plan was opened.
    """
    return _read_threads(os.getpid())


@functools.lru_cache(maxsize=1)
def _read_threads(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "read")  # threads do not survive a fork: one pool a process


class UnavailableError(OSError):
    """A store that gave no answer within its deadline. Says nothing about the data: this is no damage."""


class Storage(Protocol):
    """A flat namespace of files below one root."""

    root: str

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset + length) of a file, fewer when it is shorter. FileNotFoundError when absent."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file atomically: a reader sees the old bytes or the new ones."""

    def create(self, name: str, data: bytes) -> bool:
        """Create a file whole, or return False and leave the one that is there; of several writers one succeeds."""

    def publish(self, path: Path, name: str) -> None:
        """Move a finished local file to `name`, atomically."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when absent."""

    def remove(self, name: str) -> None:
        """Delete a file; one that is absent is no error."""

    def list(self, suffix: str = "") -> list[str]:
        """Sorted names below the root that end with `suffix`; unfinished files are left out."""
