"""Locks of torch's compiled extensions that a killed process left behind.

torch compiles DeepSpeed's operators on first use and guards each folder with a file `lock`. A process that is killed at
that moment leaves the file, and every later process waits for it without end or word. Compiling itself is torch's.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})  # types of file systems
SHARED_PATIENCE = 900.0  # seconds; longer than any operator takes to compile
MOMENT = 1.0  # seconds; a younger lock may be in the hands of a process that has just begun


def remove_stale_locks() -> list[Path]:
    """Remove the locks that no process holds, and return them.

    A holder keeps its lock file open, which /proc shows for the processes of this machine and user. On a file system
    that machines share the holder may be elsewhere: there a lock is only removed when it is 15 minutes old.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    removed = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            age = time.time() - lock.stat().st_mtime
            if age >= (MOMENT if _file_system(lock) in LOCAL else SHARED_PATIENCE) and not _is_open(lock):
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # its holder ended meanwhile
            continue
    return removed


def _is_open(path: Path) -> bool:
    real = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == real:
                return True
        except OSError:  # of another user, or ended
            continue
    return False


def _file_system(path: Path) -> str:
    """Type of the file system that holds a path, from the mounts of this process; "" if they are not known."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    found = [(len(mount[1]), number) for number, mount in enumerate(mounts) if real.is_relative_to(mount[1])]
    return mounts[max(found)[1]][2] if found else ""
