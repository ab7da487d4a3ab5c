"""Building one shard: groups of rows -> examples -> samples -> tar, sidecar and part.

A task lists the groups of rows. Its part, a JSON with counts and rejects, is written last and marks the shard as
finished. After an error a failure record is written instead, and the other shards continue. `shards.build.builder`
makes the tasks and runs them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from shards.build.media_used import MediaRecord, media_changed, record_media
from shards.build.oddities import OddityLog
from shards.build.writer import npy_bytes, write_shard
from shards.catalog import Row, Stage, StageSettings
from shards.convert.common import Group
from shards.convert.reading import convert_or_reject, open_rows, read_groups
from shards.format import ShardInfo, canonical_json
from shards.layout import VisualLayout
from shards.schema import Example, Limits, OverlongError, RejectedError, Sample, Source, as_reject
from shards.storage.base import Storage
from shards.storage.local import LocalStorage
from shards.storage.open import open_storage


class SampleProcessor(Protocol):
    """The model's processor as the builder uses it; see `molmo2.processing`."""

    layout: VisualLayout
    settings: dict[str, Any]

    def __call__(self, example: Example, limits: Limits) -> Sample:
        """Make the sample of an example; raises `RejectedError`."""


# count in a part -> the counted note of a record
FITTED = {
    "shrunk": "crops",
    "parts": "annotations",
    "fewer_images": "images",
    "clips": "clip",
    "lost_points": "points",
}
MAX_REASON = 1000  # characters; an error may quote a whole value, such as an image as text
ProcessorFactory = Callable[[], SampleProcessor]  # picklable: every worker makes its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shard to build, with the row numbers of its groups. Picklable."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    row: Row
    stage: Stage
    raw: Path
    out: str
    settings: StageSettings
    build_digest: str
    settings_digest: str
    verify_media: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The contribution of a finished shard to the index, and the media files that it was built from.

    `rows_digest` is a hash of the settings and of the rows that it was built from (see `RowsDigest`), `oddities` an
    `OddityLog`.
    """

    build_digest: str
    shard: dict[str, Any]
    totals: dict[str, int]
    rejects: list[dict[str, Any]]
    media: MediaRecord = field(default_factory=dict)
    rows_digest: str = ""
    oddities: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFailure:
    """A shard that could not be built. A fault of a single row is a reject and no failure."""

    build_digest: str
    shard: str
    reason: str


class RowsDigest:
    """A hash of everything that a shard is built from except its media: the settings, and its rows in their places."""

    def __init__(self, task: Task) -> None:
        self.hasher = hashlib.sha256(task.settings_digest.encode())

    def add(self, group: Group) -> None:
        """Add a group of rows."""
        self._add((group.key, [(source.file, source.row) for source in group.sources], group.values))

    def _add(self, value: Any) -> None:
        waiting = [value]  # no recursion: a row of JSON may be nested as deeply as its author likes
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                value = list(value.items())
            if isinstance(value, list | tuple):
                self.hasher.update(b"[%d" % len(value))
                waiting.extend(reversed(value))
            else:
                data = value if isinstance(value, bytes) else repr(value).encode(errors="backslashreplace")
                self.hasher.update(b"%s %d " % (type(value).__name__.encode(), len(data)))
                self.hasher.update(data)

    @property
    def text(self) -> str:
        """The hash, in hexadecimal digits."""
        return self.hasher.hexdigest()


def rows_digest(task: Task) -> str:
    """The hash of a shard's rows as they are in the tables now; no media are read."""
    table, rows = open_rows(task.row, task.stage, task.raw), RowsDigest(task)
    for group in read_groups(task.row, task.stage, task.raw, table, task.groups):
        rows.add(group)
    return rows.text


def finished(task: Task, storage: Storage) -> Part | None:
    """The part of a shard that an earlier run finished with these settings; None if its rows, files or media differ.

    If a table has changed since, as by rows that were appended, the shard's own rows are compared.
    """
    try:
        part = Part(**json.loads(storage.read(f"{task.name}.part.json")))
        shard = ShardInfo(**part.shard)
        sidecar = storage.read(f"{task.name}.idx.npy")
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if storage.size(f"{task.name}.tar") != shard.bytes:
        return None
    if part.build_digest != task.build_digest and (not part.rows_digest or part.rows_digest != rows_digest(task)):
        return None
    if hashlib.sha256(sidecar).hexdigest() != shard.index_sha256:
        return None
    return None if media_changed(part.media, task.raw, task.verify_media) else part


def failed(task: Task, storage: Storage) -> ShardFailure | None:
    """The failure record of a shard from an earlier run of the same build; None if there is none."""
    try:
        failure = ShardFailure(**json.loads(storage.read(f"{task.name}.failed.json")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return failure if failure.build_digest == task.build_digest else None


def try_shard(task: Task, processor: SampleProcessor) -> Part | ShardFailure:
    """Build a shard, or record its failure. Errors of the machine (OSError, memory) are raised instead."""
    try:
        return build_shard(task, processor)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    return record_failure(task, reason)


def record_failure(task: Task, reason: str) -> ShardFailure:
    """Write the failure record of a shard."""
    failure = ShardFailure(build_digest=task.build_digest, shard=task.name, reason=reason)
    open_storage(task.out).write(f"{task.name}.failed.json", canonical_json(asdict(failure)))
    return failure


def build_shard(task: Task, processor: SampleProcessor) -> Part:
    """Convert, process and write one shard; its part is written last."""
    storage, totals, rejects = open_storage(task.out), Counter[str](), list[dict[str, Any]]()
    used: set[Path] = set()
    # The temporary tar is beside its target in a local folder; for a bucket it is in the temporary directory.
    folder = Path(storage.root) if isinstance(storage, LocalStorage) else Path(tempfile.gettempdir())
    temporary = folder / f".{task.name}.tar.{uuid.uuid4().hex[:8]}.tmp"
    read = RowsDigest(task)
    oddities = OddityLog()
    samples = _samples(task, processor, totals, rejects, used, read, oddities)
    try:
        shard, rows = write_shard(temporary, task.name, samples, processor.layout, task.settings.num_variants)
        storage.publish(temporary, f"{task.name}.tar")
    finally:
        temporary.unlink(missing_ok=True)
    storage.write(f"{task.name}.idx.npy", npy_bytes(rows))
    totals.update(
        samples=len(rows),
        tokens=int(rows["num_tokens"][:, 0].sum()),
        crops=int(rows["num_crops"][:, 0].sum()),
        frames=int(rows["num_frames"].sum()),
        bytes=shard.bytes,
        rejects=len(rejects),
    )
    part = Part(
        build_digest=task.build_digest,
        shard=shard.model_dump(),
        totals=dict(totals),
        rejects=rejects,
        media=record_media(used, task.raw, task.verify_media),
        rows_digest=read.text,
        oddities=oddities.to_json(),
    )
    storage.remove(f"{task.name}.failed.json")
    record_part(part, task, storage)
    return part


def record_part(part: Part, task: Task, storage: Storage) -> None:
    """Write the part of a shard, which marks it as finished."""
    storage.write(f"{task.name}.part.json", canonical_json(asdict(part)))


def _samples(
    task: Task,
    processor: SampleProcessor,
    totals: Counter[str],
    rejects: list[dict[str, Any]],
    used: set[Path],
    read: RowsDigest,
    oddities: OddityLog,
) -> Iterator[Sample]:
    """Yield the samples of a shard.

    Adds counts to `totals`, rows without a sample to `rejects`, media to `used`, every row to `read`, and
    what is odd to `oddities`.
    """
    row, stage, raw = task.row, task.stage, task.raw
    table, variants = open_rows(row, stage, raw), task.settings.num_variants
    for group in read_groups(row, stage, raw, table, task.groups, used, variants):
        read.add(group)
        for item in convert_or_reject(group):
            if isinstance(item, Example):
                for result in _process(processor, item, task.settings.limits):
                    if isinstance(result, Sample):
                        totals["annotations"] += int(result.variants[0]["branch"][-1])
                        notes = result.record.get("fitted", ())
                        totals.update(kind for kind, noted in FITTED.items() if any(noted in note for note in notes))
                        oddities.add(item, result)
                        yield result
                    else:
                        rejects.append(_reject(task.row.name, item.key, item.source, str(result)))
            else:
                rejects.append(_reject(task.row.name, group.key, item.source, item.reason, omitted=not item.fault))


def _process(processor: SampleProcessor, example: Example, limits: Limits) -> Iterator[Sample | RejectedError]:
    """Make the sample of an example; a tree that does not fit is halved until it does, which the record notes."""
    try:
        yield processor(example, limits)
    except OverlongError:
        whole = example.annotations
        middle = len(whole) // 2
        for number, part in enumerate((whole[:middle], whole[middle:])):
            half = replace(example, key=f"{example.key}-{'ab'[number]}", annotations=part)
            for result in _process(processor, half, limits):
                if isinstance(result, Sample):
                    note = {"annotations": {"wanted": len(whole), "kept": len(part)}}
                    result.record.setdefault("fitted", []).append(note)
                yield result
    except Exception as error:
        yield as_reject(error, "the example cannot be processed")


def _reject(dataset: str, key: str, source: Source, reason: str, *, omitted: bool = False) -> dict[str, Any]:
    reason = reason.encode(errors="backslashreplace").decode()  # it may quote a text that cannot be encoded
    if len(reason) > MAX_REASON:
        reason = f"{reason[: MAX_REASON // 2]} ... {reason[-MAX_REASON // 2 :]}"
    place = {"dataset": dataset, "key": key, "file": source.file, "row": source.row}
    return {**place, "reason": reason, "omitted": omitted}
