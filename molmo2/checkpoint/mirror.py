"""The mirror of a run: copies of checkpoints in a bucket, uploaded in the background and downloaded for a resume.

    <train.mirror>/<run>/step-00001000/...     as on the disk; meta.json is uploaded last and marks a copy as whole
                                      /sending.json   sizes and digests of the files that were uploaded or will be

    python -m molmo2.checkpoint.upload runs/NAME/checkpoints/step-00001000 s3://bucket/runs/NAME 2 0  (the trainer does)

A separate process uploads, so that it takes no time from the ranks and shares no lock with them. Only one upload runs
at a time; training never waits for it, and only the newest checkpoint is next. The mirror can be any storage that
`shards.storage.open` opens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from molmo2.checkpoint.files import (
    META,
    STEP_NAME,
    Checkpoint,
    checkpoints_dir,
    find_damage,
    find_newest,
    step_of,
)
from molmo2.checkpoint.untrusted import BAD_META, listed_files
from molmo2.config import Recipe
from shards.atomic import append_to, file_lock
from shards.storage.base import Storage
from shards.storage.local import cache_dir
from shards.storage.open import open_storage

CHUNK = 64 << 20  # bytes of a file that are read at once
LOG_NAME = "mirror.log"
MANIFEST = "sending.json"  # its digests are those of the files beside it, as far as they are there


def mirror_url(recipe: Recipe) -> str | None:
    """The URL of a run's mirror; None if the recipe has no mirror."""
    return None if recipe.train.mirror is None else f"{recipe.train.mirror.rstrip('/')}/{recipe.name}"


def steps(store: Storage) -> list[str]:
    """Names of the whole copies in a mirror, the newest first."""
    folders = (name.removesuffix(f"/{META}") for name in store.list(f"/{META}"))
    return sorted((name for name in folders if STEP_NAME.fullmatch(name)), reverse=True)


def fetch(url: str, directory: Path, after: int, say: Callable[[str], None]) -> None:
    """Download the newest whole copy of a step after `after`, if there is one; `say` reports damaged copies."""
    store = open_storage(url)
    for name in steps(store):
        if step_of(name) <= after:
            return
        temporary = directory / f".tmp-{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        wrong = _download(store, name, temporary) or find_damage(temporary)
        if wrong is None:
            shutil.rmtree(directory / name, ignore_errors=True)
            os.replace(temporary, directory / name)
            say(f"{directory / name}: brought back from {url}")
            return
        say(f"{url}/{name}: skipped: {wrong}")
        shutil.rmtree(temporary, ignore_errors=True)


def _download(store: Storage, name: str, target: Path) -> str | None:
    """Download the files that a copy's meta.json names, and return why it is no copy of a checkpoint, or None."""
    meta = store.read(f"{name}/{META}")
    try:
        files = listed_files(json.loads(meta))
    except BAD_META as error:
        return f"{META} cannot be read: {type(error).__name__}: {error}"
    for file, (size, _) in files.items():
        try:
            _get(store, f"{name}/{file}", target / file, size)
        except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            return f"{file}: {error}"
    target.mkdir(parents=True, exist_ok=True)
    (target / META).write_bytes(meta)
    return None


def _get(store: Storage, name: str, target: Path, size: int) -> None:
    """Download a file, or as much of it as its copy should have."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out:
        while (offset := out.tell()) < size and (data := store.read(name, offset, min(CHUNK, size - offset))):
            out.write(data)


def newest(recipe: Recipe, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of a run: from the disk or, if a newer one is there, downloaded from its mirror."""
    directory, url = checkpoints_dir(recipe.run_dir), mirror_url(recipe)
    local = find_newest(directory, say)
    if url is None:
        return local
    directory.mkdir(parents=True, exist_ok=True)
    fetch(url, directory, 0 if local is None else local.step, say)
    return find_newest(directory, lambda _: None)


def cached(url: str, say: Callable[[str], None]) -> Path:
    """The cache folder with the newest whole copy of a run's mirror; a lock makes the ranks of a machine take turns."""
    folder = checkpoints_dir(cache_dir() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:16])
    with file_lock(folder / ".lock", wait=True):
        local = find_newest(folder, say)
        fetch(url, folder, 0 if local is None else local.step, say)
    return folder.parent


class Sender:
    """The background process that uploads checkpoints one after another; rank 0 has it. No method waits."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.url, self.say = mirror_url(recipe), say
        self.keep = (recipe.train.keep_last, recipe.train.keep_every or 0)
        self.log = recipe.run_dir / LOG_NAME
        self.process: subprocess.Popen[bytes] | None = None
        self.current: Path | None = None  # the checkpoint that is being uploaded
        self.next: Path | None = None  # the one after it

    @property
    def in_use(self) -> set[Path]:
        """Checkpoints that must stay on the disk."""
        return {path for path in (self.current, self.next) if path is not None}

    def start(self, checkpoint: Path) -> None:
        """Upload a checkpoint as soon as the upload before it is done; nothing happens without a mirror."""
        if self.url is None:
            return
        if self.next is not None:
            self._warn(self.next, "it was passed over, since the mirror is slower than train.checkpoint_every")
        self.next = checkpoint
        self.advance()

    def advance(self) -> bool:
        """Report an upload that has failed, start the next one, and return whether one is running."""
        if self.process is not None and self.process.poll() is not None:
            if self.process.returncode:
                self._warn(self.current, f"see {self.log}")
            self.process = self.current = None
        if self.process is None and self.next is not None:
            self.current, self.next = self.next, None
            command = [
                sys.executable,
                "-m",
                "molmo2.checkpoint.upload",
                str(self.current),
                str(self.url),
                *map(str, self.keep),
            ]
            with append_to(self.log) as log:
                # It runs in a session of its own, so that a signal to the ranks does not end it.
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return self.process is not None

    def give_up(self) -> None:
        """End an upload that is still running; half a copy is never taken for a whole one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for path in sorted(self.in_use):
                self._warn(path, "the run ended before the copy did; it is on the disk; see train.mirror_deadline")
        self.process = self.current = self.next = None

    def _warn(self, checkpoint: Path | None, reason: str) -> None:
        """Report a missing copy. It is no error, since the checkpoint is on the disk."""
        self.say(f"WARNING: {checkpoint} could not be copied to {self.url}: {reason}")
