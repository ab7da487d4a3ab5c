"""A local directory as a `shards.storage.base.Storage`."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path, PurePosixPath

from shards.atomic import create_atomic, replacing, sync, write_atomic


def cache_dir() -> Path:
    """The folder of files cached from a bucket: `$XDG_CACHE_HOME/nanomolmo2` (default `~/.cache/nanomolmo2`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanomolmo2")


class LocalStorage:
    """A local directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)

    def path(self, name: str) -> Path:
        """The path of a file.

        Raises:
            ValueError: the name is absolute or leaves the root.
        """
        return _safe_path(self.root, name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`. It uses pread and not mmap, because a truncated file would cause SIGBUS."""
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
        write_atomic(self.path(name), data, durable=True)

    def create(self, name: str, data: bytes) -> bool:
        """See `Storage.create`."""
        return create_atomic(self.path(name), data)

    def publish(self, path: Path, name: str) -> None:
        """See `Storage.publish`."""
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            sync(path)
            os.replace(path, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with replacing(target, durable=True) as temporary:  # another file system: copy beside the target, rename
                shutil.copyfile(path, temporary)
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


@functools.lru_cache(maxsize=1 << 16)
def _safe_path(root: str, name: str) -> Path:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise ValueError(f"{root}: unsafe file name {name!r}: it must be relative and stay below the root")
    return Path(root, *parts.parts)
