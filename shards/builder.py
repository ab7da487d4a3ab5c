"""Building a dataset: rows -> examples -> samples -> shards, in a process pool, continued where it was killed.

A dataset is cut into shards by example groups, before anything is decoded, so the cut depends on the rows alone and
not on the number of workers. One task is one shard; it is finished when its tar, its sidecar and its part (a JSON
with the counts and rejects, written last) are there and belong to the same build. `index.json` closes the dataset.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from shards.catalog import Row, Stage, StageSettings, split_of
from shards.convert import CONVERTERS
from shards.convert.common import Group
from shards.format import (
    FORMAT_VERSION,
    INDEX_NAME,
    REJECTS_NAME,
    DatasetIndex,
    ShardInfo,
    Totals,
    canonical_json,
    digest,
    index_dtype,
    parse_index,
)
from shards.layout import VisualLayout
from shards.schema import Example, FilteredError, Limits, RejectedError, Sample, Source
from shards.sources.media_files import MediaFiles
from shards.sources.parquet import Table, open_table
from shards.storage import LocalStorage
from shards.writer import npy_bytes, write_shard

REJECT_BUDGET = 0.05  # share of a dataset's groups that may be rejected without stopping the build


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

    number: int
    groups: tuple[tuple[int, ...], ...]
    row: Row
    stage: Stage
    raw: Path
    out: Path
    settings: StageSettings
    build_digest: str

    @property
    def name(self) -> str:
        """Stem of the shard's files."""
        return f"{self.number:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a finished shard contributes to the index."""

    build_digest: str
    shard: dict[str, Any]
    totals: dict[str, int]
    rejects: list[dict[str, Any]]


# --- in the main process ---------------------------------------------------------------------------------------------


def build_dataset(
    row: Row,
    stage: Stage,
    settings: StageSettings,
    make_processor: ProcessorFactory,
    *,
    raw: Path,
    out: Path,
    workers: int = 1,
    overwrite: bool = False,
    reject_budget: float = REJECT_BUDGET,
) -> DatasetIndex:
    """Build one dataset of the catalog into the folder `out`, or continue; returns its index.

    Args:
        row: the dataset.
        stage: the stage it is built for.
        settings: limits, variants, examples per shard.
        make_processor: called in every worker.
        raw: the dataset's folder of raw files.
        out: the folder of shards; nothing in it may belong to another build unless `overwrite`.
        workers: processes.
        overwrite: throw away what another build left there.
        reject_budget: the largest share of rejected groups.

    Raises:
        SourceError: raw files missing or of another layout.
        BuildError: another build's shards in `out`, too many rejects, a full disk, a crashed worker.
    """
    processor = make_processor()
    table = open_table(raw, row.files[split_of(stage)], row.columns.values())
    groups = group_rows(table, row.group_by)
    build = {
        "row": row.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json"),
        "processor": processor.settings,
        "rows": list(table.counts),
    }
    storage = LocalStorage(out)
    _claim(storage, build, overwrite)
    size = settings.examples_per_shard
    tasks = [
        Task(
            number=number,
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
    parts = _run(tasks, make_processor, workers, f"{stage}/{row.name}")
    index = _index(row, stage, settings, processor, build, parts)
    rejects = [reject for part in parts for reject in part.rejects]
    storage.write(REJECTS_NAME, b"".join(canonical_json(reject) + b"\n" for reject in rejects))
    try:
        _check_budget(f"{out}/{REJECTS_NAME}", rejects, len(groups), reject_budget)
    except BuildError:
        _reopen(storage, parts)
        raise
    storage.write(INDEX_NAME, (index.model_dump_json(indent=1) + "\n").encode())
    return index


def group_rows(table: Table, group_by: str | None) -> list[tuple[int, ...]]:
    """Row numbers of every example group, in the order in which the groups first appear."""
    if group_by is None:
        return [(number,) for number in range(len(table))]
    groups: dict[Any, list[int]] = {}
    for number, value in enumerate(table.column(group_by)):
        groups.setdefault(value, []).append(number)
    return [tuple(numbers) for numbers in groups.values()]


def _claim(storage: LocalStorage, build: dict[str, Any], overwrite: bool) -> None:
    """Mark the folder as this build's, or refuse another's."""
    try:
        found = json.loads(storage.read("build.json"))
    except FileNotFoundError:
        found = build if storage.size(INDEX_NAME) is None else {}
    if digest(found) != digest(build):
        changed = sorted(key for key in build if digest(found.get(key)) != digest(build[key]))
        if not overwrite:
            raise BuildError(
                f"{storage.root} was built with other settings ({', '.join(changed)} differ); "
                "give --overwrite to build it anew, or choose another --out"
            )
        storage.path(INDEX_NAME).unlink(missing_ok=True)
        for name in storage.list():
            storage.path(name).unlink()
    storage.write("build.json", canonical_json(build))


def _run(tasks: list[Task], make_processor: ProcessorFactory, workers: int, label: str) -> list[Part]:
    """All parts in order; finished shards are taken as they are."""
    done = {task.number: part for task in tasks if (part := _finished(task)) is not None}
    waiting = [task for task in tasks if task.number not in done]
    with tqdm(total=len(tasks), initial=len(done), desc=label, unit="shard", mininterval=0.5) as bar:
        if workers <= 1 or len(waiting) <= 1:
            _start_worker(make_processor)
            for task in waiting:
                done[task.number] = _guarded(lambda task=task: _build_shard(task), label)  # type: ignore[misc]
                bar.update()
        else:
            context = get_context("spawn")
            with ProcessPoolExecutor(workers, context, _start_worker, (make_processor,)) as pool:
                futures: dict[Future[Part], Task] = {pool.submit(_build_shard, task): task for task in waiting}
                for future in as_completed(futures):
                    try:
                        done[futures[future].number] = _guarded(future.result, label)
                    except BuildError:
                        pool.shutdown(cancel_futures=True)
                        raise
                    bar.update()
    return [done[task.number] for task in tasks]


def _guarded(action: Callable[[], Part], label: str) -> Part:
    try:
        return action()
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BuildError(
                f"{label}: the disk is full; make room and start again: finished shards are kept"
            ) from None
        raise BuildError(f"{label}: {error}; start again to continue: finished shards are kept") from error
    except BrokenProcessPool:
        raise BuildError(
            f"{label}: a worker was killed (out of memory?); start again with fewer --workers: finished shards are kept"
        ) from None


def _finished(task: Task) -> Part | None:
    """The part of a shard that an earlier run of the same build finished, if its files are what it says."""
    storage = LocalStorage(task.out)
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
    names = ("samples", "annotations", "tokens", "crops", "frames", "bytes", "rejects")
    return DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=row.name,
        stage=stage,
        num_variants=settings.num_variants,
        processor=processor.settings,
        source=dict(row.source),
        build={key: build[key] for key in ("settings", "rows")},
        totals=Totals(**{name: sums[name] for name in names}),
        shards=tuple(ShardInfo(**part.shard) for part in parts),
    )


def _reopen(storage: LocalStorage, parts: list[Part]) -> None:
    """Make the next try build shards with rejects again: whoever mends a source expects that."""
    for part in parts:
        if any(not reject["filtered"] for reject in part.rejects):
            storage.path(f"{part.shard['name']}.part.json").unlink(missing_ok=True)


def _check_budget(where: str, found: list[dict[str, Any]], num_groups: int, budget: float) -> None:
    rejects = [reject for reject in found if not reject["filtered"]]
    if len(rejects) <= budget * num_groups:
        return
    reasons = Counter(reject["reason"].split(":")[0] for reject in rejects).most_common(5)
    listed = "\n  ".join(f"{count} x {reason}" for reason, count in reasons)
    first = rejects[0]
    raise BuildError(
        f"{len(rejects)} of {num_groups} examples rejected, {budget:.1%} are allowed:\n  {listed}\n"
        f"first: {first['file']} row {first['row']}: {first['reason']}\n"
        f"all of them stand in {where}; mend the source, or raise --reject-budget"
    )


# --- in a worker -----------------------------------------------------------------------------------------------------

_processor: Processor | None = None


def _start_worker(make_processor: ProcessorFactory) -> None:
    global _processor
    _processor = make_processor()


def _build_shard(task: Task) -> Part:
    """Convert, process and write one shard; its part is written last."""
    assert _processor is not None
    processor, storage = _processor, LocalStorage(task.out)
    limits, rejects = task.settings.to_limits(), list[dict[str, Any]]()
    totals = Counter[str]()

    def samples() -> Iterator[Sample]:
        for group in _groups(task):
            key, source = group.key, group.sources[0]
            try:
                for example in CONVERTERS[task.row.converter](group):
                    key, source = example.key, example.source
                    sample = processor(example, limits)
                    totals["annotations"] += int(sample.variants[0]["branch"][-1])
                    yield sample
            except RejectedError as error:
                rejects.append(_reject(task.row.name, key, source, error))

    task.out.mkdir(parents=True, exist_ok=True)
    temporary = storage.path(f"{task.name}.tar.tmp")
    try:
        shard, rows = write_shard(temporary, samples(), processor.layout, task.settings.num_variants)
        storage.publish(temporary, f"{task.name}.tar")
    finally:
        temporary.unlink(missing_ok=True)
    assert rows.dtype == index_dtype(task.settings.num_variants)
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


def _groups(task: Task) -> Iterator[Group]:
    table = open_table(task.raw, task.row.files[split_of(task.stage)], task.row.columns.values())
    rows = iter(table.read([number for numbers in task.groups for number in numbers], task.row.columns.values()))
    media = MediaFiles(root=task.raw, template=task.row.media)
    for numbers in task.groups:
        sources, values = zip(*(next(rows) for _ in numbers), strict=True)
        key = f"{task.row.name}-{numbers[0]:08d}"
        yield Group(row=task.row, stage=task.stage, media=media, key=key, sources=sources, values=values)


def _reject(dataset: str, key: str, source: Source, error: RejectedError) -> dict[str, Any]:
    place = {"dataset": dataset, "key": key, "file": source.file, "row": source.row}
    return {**place, "reason": str(error), "filtered": isinstance(error, FilteredError)}


def load_index(out: Path) -> DatasetIndex | None:
    """The index of a finished dataset, or None."""
    try:
        return parse_index(LocalStorage(out).read(INDEX_NAME), f"{out}/{INDEX_NAME}")
    except FileNotFoundError:
        return None
