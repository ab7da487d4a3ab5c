"""The media files that a shard was built from, as its part records them: a changed file makes the shard unfinished.

A file is recorded by size and time of change, which costs one look at it, and with `verify` by its sha256 as well.
A missing file is recorded too, so that a shard is built again when the file has come.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# path relative to the folder of all raw data (or absolute) -> [bytes, nanoseconds of change, sha256 or None];
# None: the file was missing
MediaRecord = dict[str, list[Any] | None]


def record_media(files: Iterable[Path], raw: Path, verify: bool) -> MediaRecord:
    """Record files; `raw` is the raw folder of the dataset."""
    base = raw.parent.resolve()
    resolved = {Path(os.path.realpath(file)) for file in files}  # `resolve` raises for a link to itself
    names = {str(f.relative_to(base)) if f.is_relative_to(base) else str(f): f for f in resolved}
    return {name: _state(names[name], verify) for name in sorted(names)}


def media_changed(recorded: MediaRecord, raw: Path, verify: bool) -> bool:
    """Whether a recorded file has changed, gone or come. With `verify` the sha256 decides, where it was recorded."""
    base = raw.parent.resolve()
    for name, before in recorded.items():
        now = _state(base / name, verify and before is not None and before[2] is not None)
        if before is None or now is None:
            if before is not now:
                return True
        elif now[2] is not None:
            if now[2] != before[2]:
                return True
        elif now[:2] != before[:2]:
            return True
    return False


def _state(path: Path, verify: bool) -> list[Any] | None:
    try:
        status = path.stat()
        if path.is_dir():  # the frames of a video
            entries = [entry.stat() for entry in os.scandir(path)]
            return [sum(e.st_size for e in entries), sum(e.st_mtime_ns for e in entries), None]
        if not verify:
            return [status.st_size, status.st_mtime_ns, None]
        with open(path, "rb") as file:
            return [status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None
