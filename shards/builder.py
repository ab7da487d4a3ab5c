"""Building a dataset: rows -> examples -> samples -> shards, in a process pool, continued where it was killed.

A dataset is cut into shards by groups of rows, before anything is decoded, so the cut depends on the rows alone and
not on the number of workers. One task is one shard; it is finished when its tar, its sidecar and its part (a JSON
with the counts and rejects, written last) are there and belong to the same build. `index.json` closes the dataset.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from shards.catalog import Row, Stage, StageSettings
from shards.convert import CONVERTERS
from shards.convert.common import Group, Omitted
from shards.convert.reading import convert, open_rows, read_groups
from shards.format import (
    FORMAT_VERSION,
    INDEX_NAME,
    REJECTS_NAME,
    DatasetIndex,
    ShardInfo,
    Totals,
    canonical_json,
    digest,
)
from shards.layout import VisualLayout
from shards.schema import Example, Limits, OverlongError, RejectedError, Sample, Source
from shards.storage import LocalStorage
from shards.writer import npy_bytes, write_shard

REJECT_BUDGET = 0.05  # rejects over groups of rows
BUILD_VERSION = 2  # raise it when converters or writer make other samples of the same settings
BUILD_NAME = "build.json"
OWN_FILES = re.compile(
    r"\d{6}\.(tar|idx\.npy|part\.json)|(index|build|repair)\.json|(rejects|repairs)\.jsonl|\..+\.tmp"
)


class BuildError(ValueError):
    """A build that cannot go on; what is finished stays and is used by the next try."""


class Processor(Protocol):
    """What the model hands to the builder: see `molmo2.processing`."""

    layout: VisualLayout
    settings: dict[str, Any]

    def __call__(self, example: Example, limits: Limits) -> Sample:
        """The sample of an example; raises `RejectedError`."""


ProcessorFactory = Callable[[], Processor]  # picklable: every worker makes its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shard: which groups of rows it holds. Picklable."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    row: Row
    stage: Stage
    raw: Path
    out: Path
    settings: StageSettings
    build_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a finished shard contributes to the index."""

    build_digest: str
    shard: dict[str, Any]
    totals: dict[str, int]
    rejects: list[dict[str, Any]]


# --- in the main process ---------------------------------------------------------------------------------------------


@contextmanager
def worker_pool(make_processor: ProcessorFactory, workers: int) -> Iterator[Executor | None]:
    """Processes for `build_dataset`, for any number of datasets of one stage; None for a single worker."""
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks of the decoders' and of arrow's threads
    with ProcessPoolExecutor(workers, context, _start_worker, (make_processor,)) as pool:
        yield pool


def build_dataset(
    row: Row,
    stage: Stage,
    settings: StageSettings,
    make_processor: ProcessorFactory,
    *,
    raw: Path,
    out: Path,
    pool: Executor | None = None,
    overwrite: bool = False,
    reject_budget: float = REJECT_BUDGET,
) -> DatasetIndex:
    """Build one dataset of the catalog into the folder `out`, or continue; returns its index.

    Args:
        row: the dataset.
        stage: the stage it is built for.
        settings: limits, variants, examples per shard.
        make_processor: makes this process's processor; `pool` has its own.
        raw: the dataset's folder of raw files.
        out: the folder of shards; nothing in it may belong to another build unless `overwrite`.
        pool: a `worker_pool` made with the same `make_processor`; without one, this process does the work.
        overwrite: throw away what another build left there.
        reject_budget: the most rejects, as a share of the groups of rows.

    Raises:
        SourceError: raw files missing, damaged, or of another layout.
        BuildError: another build's shards in `out`, too many rejects, a full disk, a killed worker.
    """
    label = f"{stage}/{row.name}"
    if row.converter not in CONVERTERS:
        raise BuildError(f"{label}: no converter {row.converter!r}; the catalog may name {', '.join(CONVERTERS)}")
    processor = make_processor()
    table = open_rows(row, stage, raw)
    groups, size = table.groups(row.group_by), settings.examples_per_shard
    build = {
        "version": [FORMAT_VERSION, BUILD_VERSION],
        "row": row.build_settings(),
        "settings": settings.model_dump(mode="json"),
        "processor": processor.settings,
        "files": {f.relative_to(raw).as_posix(): h for f, h in zip(table.files, table.digests, strict=True)},
    }
    with _explained(label), _locked(out):
        storage = LocalStorage(out)
        _claim(storage, build, overwrite)
        tasks = [
            Task(
                name=f"{number:06d}",
                groups=tuple(groups[first : first + size]),
                row=row,
                stage=stage,
                raw=raw,
                out=out,
                settings=settings,
                build_digest=digest(build),
            )
            for number, first in enumerate(range(0, len(groups), size))
        ]
        parts: dict[str, Part] = {}
        with closing(_run(tasks, storage, processor, pool, label)) as running:
            for task, part in running:
                parts[task.name] = part
                _check_budget(storage, parts, len(groups), reject_budget)
        ordered = [parts[task.name] for task in tasks]
        _write_rejects(storage, ordered)
        index = _index(row, stage, settings, processor, build, ordered)
        if index.totals.samples == 0:
            raise BuildError(f"{label}: no sample was made; {out / REJECTS_NAME} says why")
        storage.write(INDEX_NAME, (index.model_dump_json(indent=1) + "\n").encode())
    return index


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turn what the machine does to a build into a message for its user."""
    try:
        yield
    except BrokenProcessPool:
        raise BuildError(
            f"{label}: a worker was killed (out of memory?); start again with fewer --workers: finished shards are kept"
        ) from None
    except OSError as error:
        why = "the disk is full; make room" if error.errno in {errno.ENOSPC, errno.EDQUOT} else str(error)
        raise BuildError(f"{label}: {why}; the same command continues: finished shards are kept") from error


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the kernel drops the lock of a process that was killed."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(f"{out}: another build is at work there; wait for it, or stop it") from None
        yield


def _claim(storage: LocalStorage, build: dict[str, Any], overwrite: bool) -> None:
    """Mark the folder as this build's, or refuse another's; remove what a killed build left unfinished."""
    try:
        found = json.loads(storage.read(BUILD_NAME))
    except FileNotFoundError:
        found = {} if storage.size(INDEX_NAME) is not None else build
    except ValueError:
        found = {}
    if digest(found) != digest(build):
        if not overwrite:
            raise BuildError(
                f"{storage.root} was built with other settings: {'; '.join(_differences(found, build)[:5])}; "
                "give --overwrite to build it anew, or choose another --out"
            )
        storage.path(INDEX_NAME).unlink(missing_ok=True)  # first: from here on the dataset is not whole
        for path in Path(storage.root).iterdir():
            if OWN_FILES.fullmatch(path.name):
                path.unlink()
    for path in Path(storage.root).glob(".*.tmp"):
        path.unlink()
    storage.write(BUILD_NAME, canonical_json(build))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: dotted name, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for n in names for line in _differences(old.get(n), new.get(n), f"{path}.{n}".lstrip("."))]
    return [] if digest(old) == digest(new) else [f"{path} was {str(old)[:60]}, is {str(new)[:60]}"]


def _run(
    tasks: list[Task], storage: LocalStorage, processor: Processor, pool: Executor | None, label: str
) -> Generator[tuple[Task, Part]]:
    """The parts of all tasks, those of finished shards first, the others when they are built."""
    done = [(task, part) for task in tasks if (part := _finished(task, storage)) is not None]
    yield from done
    finished = {task.name for task, _ in done}
    waiting = [task for task in tasks if task.name not in finished]
    if waiting:
        storage.path(INDEX_NAME).unlink(missing_ok=True)
    total, initial = sum(len(task.groups) for task in tasks), sum(len(task.groups) for task, _ in done)
    with tqdm(total=total, initial=initial, desc=label, unit="ex", mininterval=0.5) as bar:
        for task, part in _build_all(waiting, processor, pool):
            bar.update(len(task.groups))
            yield task, part


def _build_all(tasks: list[Task], processor: Processor, pool: Executor | None) -> Iterator[tuple[Task, Part]]:
    if pool is None:
        for task in tasks:
            yield task, _build_shard(task, processor)
        return
    futures = {pool.submit(_build_in_worker, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()  # after an error no further shard is begun; those in work are finished


def _finished(task: Task, storage: LocalStorage) -> Part | None:
    """The part of a shard that an earlier run of the same build finished, if its files are what it says."""
    try:
        part = Part(**json.loads(storage.read(f"{task.name}.part.json")))
        shard = ShardInfo(**part.shard)
        sidecar = storage.read(f"{task.name}.idx.npy")
    except (FileNotFoundError, ValueError, TypeError):
        return None
    same = part.build_digest == task.build_digest and storage.size(f"{task.name}.tar") == shard.bytes
    return part if same and hashlib.sha256(sidecar).hexdigest() == shard.index_sha256 else None


def _index(
    row: Row, stage: Stage, settings: StageSettings, processor: Processor, build: dict[str, Any], parts: list[Part]
) -> DatasetIndex:
    sums = Counter[str]()
    for part in parts:
        sums.update(part.totals)
    return DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=row.name,
        stage=stage,
        num_variants=settings.num_variants,
        processor=processor.settings,
        source=dict(row.source),
        build={key: build[key] for key in ("version", "settings", "files")},
        totals=Totals(**{name: sums[name] for name in Totals.model_fields}),
        shards=tuple(ShardInfo(**part.shard) for part in parts),
    )


def _write_rejects(storage: LocalStorage, parts: list[Part]) -> None:
    rejects = [reject for part in parts for reject in part.rejects]
    storage.write(REJECTS_NAME, b"".join(canonical_json(reject) + b"\n" for reject in rejects))


def _check_budget(storage: LocalStorage, parts: dict[str, Part], num_groups: int, budget: float) -> None:
    """Stop as soon as the whole dataset cannot stay within the budget.

    Shards with rejects are built again by the next try: whoever mends a source expects that.
    """
    faulty = {name: part for name, part in sorted(parts.items()) if any(not r["omitted"] for r in part.rejects)}
    rejects = [reject for part in faulty.values() for reject in part.rejects if not reject["omitted"]]
    if len(rejects) <= budget * num_groups:
        return
    _write_rejects(storage, [parts[name] for name in sorted(parts)])
    for name in faulty:
        storage.path(f"{name}.part.json").unlink(missing_ok=True)
    reasons = Counter(reject["reason"].split(":")[0] for reject in rejects).most_common(5)
    listed = "".join(f"\n  {count} x {reason}" for reason, count in reasons)
    first = rejects[0]
    raise BuildError(
        f"{first['dataset']}: {len(rejects)} rejects in {num_groups} groups of rows, {budget:.1%} allowed:{listed}\n"
        f"first: {first['file']} row {first['row']}: {first['reason']}\n"
        f"all so far: {storage.root}/{REJECTS_NAME}; mend the source, or raise --reject-budget"
    )


# --- in a worker -----------------------------------------------------------------------------------------------------

_processor: Processor | None = None


def _start_worker(make_processor: ProcessorFactory) -> None:
    global _processor
    threading.Thread(target=_follow_parent, daemon=True).start()
    _processor = make_processor()


def _follow_parent() -> None:
    """End with the main process: a pool's workers would outlive one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_in_worker(task: Task) -> Part:
    assert _processor is not None
    return _build_shard(task, _processor)


def _build_shard(task: Task, processor: Processor) -> Part:
    """Convert, process and write one shard; its part is written last."""
    storage, totals, rejects = LocalStorage(task.out), Counter[str](), list[dict[str, Any]]()
    temporary = task.out / f".{task.name}.tar.{os.getpid()}.tmp"
    samples = _samples(task, processor, totals, rejects)
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
    part = Part(build_digest=task.build_digest, shard=shard.model_dump(), totals=dict(totals), rejects=rejects)
    storage.write(f"{task.name}.part.json", canonical_json(asdict(part)))
    return part


def _samples(task: Task, processor: Processor, totals: Counter[str], rejects: list[dict[str, Any]]) -> Iterator[Sample]:
    """Samples of a shard; counts go to `totals`, what does not become a sample to `rejects`."""
    row, stage, raw = task.row, task.stage, task.raw
    for group in read_groups(row, stage, raw, open_rows(row, stage, raw), task.groups):
        for item in _convert(group):
            if isinstance(item, Example):
                for made in _process(processor, item, task.settings.limits):
                    if isinstance(made, Sample):
                        totals["annotations"] += int(made.variants[0]["branch"][-1])
                        yield made
                    else:
                        rejects.append(_reject(task.row.name, item.key, item.source, str(made)))
            elif isinstance(item, Omitted):
                rejects.append(_reject(task.row.name, group.key, item.source, item.reason, omitted=True))
            else:
                rejects.append(_reject(task.row.name, group.key, group.sources[0], str(item)))


def _process(processor: Processor, example: Example, limits: Limits) -> Iterator[Sample | RejectedError]:
    """The samples of an example: one, or its tree in halves until they fit. The record of a part says so."""
    try:
        yield processor(example, limits)
    except OverlongError:
        whole = example.annotations
        middle = len(whole) // 2
        for number, part in enumerate((whole[:middle], whole[middle:])):
            half = replace(example, key=f"{example.key}-{'ab'[number]}", annotations=part)
            for made in _process(processor, half, limits):
                if isinstance(made, Sample):
                    note = {"annotations": {"wanted": len(whole), "kept": len(part)}}
                    made.record.setdefault("fitted", []).append(note)
                yield made
    except RejectedError as error:
        yield error


def _convert(group: Group) -> Iterator[Example | Omitted | RejectedError]:
    """What the converter makes of a group; an error that its values cause ends the group and becomes a reject."""
    try:
        yield from convert(group)
    except RejectedError as error:
        yield error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        yield RejectedError(f"{group.row.converter} failed on the row's values: {type(error).__name__}: {error}")


def _reject(dataset: str, key: str, source: Source, reason: str, *, omitted: bool = False) -> dict[str, Any]:
    place = {"dataset": dataset, "key": key, "file": source.file, "row": source.row}
    return {**place, "reason": reason, "omitted": omitted}
