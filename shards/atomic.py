"""Atomic writes and locks of local files: a reader sees the old file or the new one, never a part of it."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO


class LockHeldError(Exception):
    """Another process holds a lock."""


@contextmanager
def replacing(path: Path, *, temporary: Path | None = None, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` after the block, and is removed if the block fails.

    Args:
        path: the file to replace; its folder is made.
        temporary: the temporary path, on the same file system; by default a unique name beside `path`.
        durable: flush the bytes to the disk first, so that a power failure leaves no part of a file either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or _beside(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replace a file by `content`, a text as UTF-8; see `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append_to(path: Path) -> TextIO:
    """Open a text file to append to it; a link in its place is refused, since it could lead anywhere."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, and is not written to; remove it", str(path))
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def create_atomic(path: Path, content: bytes) -> bool:
    """Write a file, durably, unless it exists; returns whether it was written. One of several processes succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder; no other process may write there."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[BinaryIO]:
    """Hold a lock on a file: an exclusive one, or one that is `shared`. The file is made, and never removed.

    It yields the open file, to which the holder may write. A forked child shares the lock until it closes the file.

    It is flock, which the kernel releases when a process is killed. The library `filelock` has flock for exclusive
    locks only: its shared lock is an SQLite database. Where a file system has no flock, the library falls back to a
    lock that a killed process leaves behind; this function raises an OSError.

    Raises:
        LockHeldError: another process holds the lock, and not `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockHeldError(f"{path}: another process holds this lock") from None
        yield file


def _beside(path: Path) -> Path:
    """A unique name in the folder of `path`, hidden, so that lists of files leave it out."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
