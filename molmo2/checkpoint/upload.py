"""The process that copies a checkpoint to the mirror of its run; `molmo2.checkpoint.mirror` starts it.

It has no torch and no part in the ranks. What a mirror holds, and how it is read, is said there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from molmo2.checkpoint.files import META, superseded
from molmo2.checkpoint.mirror import MANIFEST, steps
from shards.atomic import file_lock
from shards.storage.base import Storage
from shards.storage.open import open_storage


def send(checkpoint: Path, url: str, keep_last: int, keep_every: int | None = None) -> None:
    """Upload a whole checkpoint, then delete superseded copies, as on the disk.

    Files of an earlier attempt are sent again unless the manifest has the same digest for them. Nothing older is
    deleted before `meta.json` was read back.

    Raises:
        OSError: the storage does not answer, refuses to write, or returns something else than was written.
    """
    store, meta = open_storage(url), (checkpoint / META).read_bytes()
    files = json.loads(meta)["files"]
    _remove_others(store, checkpoint.name, meta, files)
    store.write(f"{checkpoint.name}/{MANIFEST}", json.dumps(files).encode())
    for name, (size, _) in files.items():
        target = f"{checkpoint.name}/{name}"
        if store.size(target) != size:
            _put(store, checkpoint / name, target)
            if (stored := store.size(target)) != size:
                raise OSError(f"{url}/{target}: the copy has {stored} bytes, the file has {size}")
    store.write(f"{checkpoint.name}/{META}", meta)
    if store.read(f"{checkpoint.name}/{META}") != meta:
        raise OSError(f"{url}/{checkpoint.name}/{META}: it was written and reads differently; older copies stay")
    for step in superseded(steps(store), keep_last, keep_every):
        store.remove(f"{step}/{META}")  # deleted first, so that a half-deleted copy is never taken for whole
        for name in store.list():
            if name.startswith(f"{step}/"):
                store.remove(name)


def _remove_others(store: Storage, step: str, meta: bytes, files: dict[str, Any]) -> None:
    """Remove what an earlier attempt left of a step, except files with the same digests."""
    left = [name.removeprefix(f"{step}/") for name in store.list() if name.startswith(f"{step}/")]
    if META in left and store.read(f"{step}/{META}") != meta:
        store.remove(f"{step}/{META}")  # first, since the files beside it will change
    sent = json.loads(store.read(f"{step}/{MANIFEST}")) if MANIFEST in left else {}
    for name in left:
        if name not in (META, MANIFEST) and (name not in files or sent.get(name) != files[name]):
            store.remove(f"{step}/{name}")


def _put(store: Storage, path: Path, target: str) -> None:
    """Upload a file. `publish` removes its source, so it gets a hard link or a copy."""
    link = path.with_name(f".{path.name}.sending")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # the file system has no hard links
        shutil.copyfile(path, link)
    try:
        store.publish(link, target)
    finally:
        link.unlink(missing_ok=True)


def main() -> int:
    """Upload one checkpoint, after an upload that a killed run of this machine has left behind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # deepspeed's launcher signals every process below a rank
    checkpoint, url, keep_last, keep_every = sys.argv[1:]
    try:
        with file_lock(Path(checkpoint).parent / ".mirror.lock", wait=True):
            send(Path(checkpoint), url, int(keep_last), int(keep_every) or None)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{checkpoint}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
