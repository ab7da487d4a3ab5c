"""Six verbs over a place where files lie: read, write, publish, size, remove, list.

Local directories here, buckets in `shards.s3`; another kind of place needs the same six methods and a line in
`open_storage`. Names are relative, with "/" between parts, and never leave the root.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import shutil
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

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

    def publish(self, path: Path, name: str) -> None:
        """Move a finished local file to `name`, atomically."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None when absent."""

    def remove(self, name: str) -> None:
        """Delete a file; one that is absent is no error."""

    def list(self, suffix: str = "") -> list[str]:
        """Sorted names below the root that end with `suffix`; unfinished files are left out."""


class LocalStorage:
    """A directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)

    def path(self, name: str) -> Path:
        """The file of a name.

        Raises:
            ValueError: the name is absolute or climbs out of the root.
        """
        return _safe_path(self.root, name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`. pread, not mmap: a file cut short must not end in SIGBUS."""
        descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if length is None:
                length = max(0, os.fstat(descriptor).st_size - offset)
            chunks = []
            while length > 0 and (chunk := os.pread(descriptor, min(length, 1 << 30), offset)):
                chunks.append(chunk)
                offset += len(chunk)
                length -= len(chunk)
        finally:
            os.close(descriptor)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def write(self, name: str, data: bytes) -> None:
        """See `Storage.write`."""
        _replace(self.path(name), io.BytesIO(data))

    def create(self, name: str, data: bytes) -> bool:
        """Create a file whole, or return False and leave the one that is there; of several writers one succeeds."""
        target = self.path(name)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            _replace(temporary, io.BytesIO(data))
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def publish(self, path: Path, name: str) -> None:
        """See `Storage.publish`."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with open(path, "rb") as file:  # another file system: bytes are copied beside the target first
                _replace(target, file)
            path.unlink()

    def size(self, name: str) -> int | None:
        """See `Storage.size`."""
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        self.path(name).unlink(missing_ok=True)

    def list(self, suffix: str = "") -> list[str]:
        """See `Storage.list`."""
        root = Path(self.root)
        names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        return sorted(name for name in names if name.endswith(suffix))


@functools.lru_cache(maxsize=4096)
def _safe_path(root: str, name: str) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"{root}: unsafe file name {name!r}: it must be relative and stay below the root")
    return Path(root, *parts.parts)


def _replace(target: Path, source: IO[bytes]) -> None:
    """Give `target` the bytes of `source` in one step, from a temporary file in the same folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def open_storage(url: str | Path) -> Storage:
    """The storage behind a URL or a path.

    Raises:
        ValueError: a scheme that is not supported, or one whose packages are not installed.
    """
    text = str(url)
    if text.startswith("s3://"):
        try:
            from shards.s3 import S3Storage
        except ImportError as error:
            raise ValueError(f"{text}: {error}; buckets need the extra: pip install -e '.[s3]'") from None
        return S3Storage(text)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise ValueError(f"{text}: unsupported scheme; give a local directory, a file:// or an s3:// URL")
    return LocalStorage(text)
