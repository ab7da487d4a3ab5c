"""Building a dataset shard by shard in a process pool; a killed build resumes.

The groups of rows are divided into shards before anything is decoded, so the division depends on the rows and not on
the number of workers. One `Task` is one shard (`shards.build.task`); it is finished when its tar, its sidecar and its
part exist and belong to the same build. `index.json` is written last.

Run r of n builds every n-th shard from r on. Such runs may be concurrent, on machines with a common file system, in any
order, and repeated; a run of the whole dataset, (0, 1), finds their shards finished and writes the index.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from shards.build.claim import BuildError, check_mark, claim, join, locked, without_tables
from shards.build.oddities import merge_oddities
from shards.build.pool import WorkerPool, build_all
from shards.build.rejects import kinds, over_budget
from shards.build.task import (
    FITTED,
    Part,
    ProcessorFactory,
    SampleProcessor,
    ShardFailure,
    Task,
    failed,
    finished,
    record_part,
)
from shards.catalog import Row, Stage, StageSettings
from shards.catalog.converters import converter_problems
from shards.convert.reading import open_rows, stage_groups
from shards.convert.skips import unmatched_skips
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
from shards.machine import memory_text
from shards.sources.parquet import SourceError
from shards.storage.base import Storage
from shards.storage.open import open_storage

REJECT_BUDGET = 0.05  # largest ratio of rejects to groups of rows
MAX_FAILED = 5  # a run stops after more failed shards than this: the cause is systematic
FETCHED = re.compile(r"(^|/)media/[0-9a-f]{2}/[0-9a-f]{64}$")  # where the file of a URL is stored
BUILD_VERSION = 5  # increment it when decoding, converters or writer make other samples from the same settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Result of a run of `build_dataset`.

    Attributes:
        index: index of the dataset; None after a run that built only a part of it.
        made: totals of the shards that this run built, by the names of `Totals`.
        num_made: number of shards that this run built.
        num_kept: number of its shards that earlier runs had finished.
        unmatched_skips: items of the catalog's `skip` that no row has, after a run of the whole dataset.
        oddities: what is odd about what was used, after such a run, as `merge_oddities` returns it.
    """

    index: DatasetIndex | None
    made: Counter[str]
    num_made: int
    num_kept: int
    unmatched_skips: tuple[str, ...] = ()
    oddities: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_dataset(
    row: Row,
    stage: Stage,
    settings: StageSettings,
    make_processor: ProcessorFactory,
    *,
    raw: Path,
    out: str | Path,
    pool: WorkerPool | None = None,
    task_of: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    retry_failed: bool = False,
    reject_budget: float = REJECT_BUDGET,
    verify_media: bool = False,
) -> Built:
    """Build one dataset of the catalog, or every n-th shard of it, into a folder or a bucket; resumes an earlier run.

    Args:
        row: the dataset.
        stage: the stage to build for.
        settings: limits, variants, examples per shard.
        make_processor: makes the processor of this process; the workers of `pool` make their own.
        raw: the raw folder of the dataset.
        out: folder or s3:// URL of the shards; it must not hold another build unless `overwrite`.
        pool: a `worker_pool` made with the same `make_processor`; None builds in this process.
        task_of: (r, n) of task r/n; only a run of the whole dataset, (0, 1), writes the index.
        overwrite: delete the shards of another build; only with (0, 1).
        retry_failed: build only those missing shards that failed before.
        reject_budget: largest ratio of rejects of one cause (media, values) to the groups of rows of this run.
        verify_media: compare media files by sha256 with those that a shard was built from, not by size and time.

    Raises:
        SourceError: raw files are missing or damaged, or lack columns.
        BuildError: `out` holds another build, there are too many rejects or failed shards, or the disk is full.
    """
    label = f"{stage}/{row.name}"
    (rank, number), whole = task_of, task_of == (0, 1)
    if not 0 <= rank < number or (overwrite and not whole):
        raise BuildError(f"{label}: task {rank}/{number}: r must be in 0..N-1, and only 0/1 may overwrite")
    processor = make_processor()
    with _table_errors(label):
        build, tasks = _plan(row, stage, settings, processor, raw, str(out))
    tasks = [replace(task, verify_media=verify_media) for task in tasks]
    mine, storage = tasks[rank::number], open_storage(out)
    with _os_errors(label), locked(storage, shared=not whole):
        if whole:
            claim(storage, build, len(tasks), overwrite)
        else:
            join(storage, build)
        with _table_errors(label):
            kept = {task.name: part for task in mine if (part := finished(task, storage)) is not None}
        for task in mine:
            if task.name in kept and kept[task.name].build_digest != task.build_digest:  # its tables have changed since
                kept[task.name] = replace(kept[task.name], build_digest=task.build_digest)
                record_part(kept[task.name], task, storage)
        missing = [task for task in mine if task.name not in kept]
        waiting = [task for task in missing if not retry_failed or failed(task, storage)]
        if missing:
            storage.remove(INDEX_NAME)
        with closing(_run(waiting, mine, kept, processor, pool, label)) as running:
            for results in running:
                _check_budget(storage, mine, results, reject_budget)
        parts = _parts_or_raise(label, results)
        made = Counter[str]()
        for task in waiting:
            made.update(parts[task.name].totals)
        index, unmatched, oddities = None, list[str](), dict[str, dict[str, Any]]()
        if whole:
            if len(parts) < len(tasks):
                raise BuildError(
                    f"{label}: {len(tasks) - len(parts)} shards are still to be built; omit --retry-failed"
                )
            ordered = [parts[task.name] for task in tasks]
            unmatched = unmatched_skips(row, raw, (reject["reason"] for part in ordered for reject in part.rejects))
            oddities = merge_oddities((part.shard["samples"], part.oddities) for part in ordered)
            _write_rejects(storage, ordered)
            index = _index(row, stage, settings, processor, build, ordered)
            if index.totals.samples == 0:
                raise BuildError(f"{label}: no sample was made; {storage.root}/{REJECTS_NAME} says why")
            check_mark(storage, build)
            storage.write(INDEX_NAME, (index.model_dump_json(indent=1) + "\n").encode())
    return Built(
        index=index,
        made=made,
        num_made=len(waiting),
        num_kept=len(kept),
        unmatched_skips=tuple(unmatched),
        oddities=oddities,
    )


def _plan(
    row: Row, stage: Stage, settings: StageSettings, processor: SampleProcessor, raw: Path, out: str
) -> tuple[dict[str, Any], list[Task]]:
    """The settings that determine the bytes of a dataset, and its tasks; they are the same on every machine."""
    if problems := converter_problems(row):
        raise BuildError("\n  ".join([f"{stage}/{row.name}:", *problems]))
    table = open_rows(row, stage, raw)
    groups, size = stage_groups(row, stage, table), settings.examples_per_shard
    build = {
        "version": [FORMAT_VERSION, BUILD_VERSION],
        "row": row.build_settings(stage),
        "settings": settings.model_dump(mode="json"),
        "processor": processor.settings,
        "files": {f.relative_to(raw).as_posix(): h for f, h in zip(table.files, table.digests, strict=True)},
    }
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
            settings_digest=digest(without_tables(build)),
        )
        for number, first in enumerate(range(0, len(groups), size))
    ]
    return build, tasks


@contextmanager
def _table_errors(label: str) -> Iterator[None]:
    """Turn any error of reading a dataset's tables into a `SourceError`, so that the other datasets are still built."""
    try:
        yield
    except (SourceError, BuildError):
        raise
    except (
        *(OSError, MemoryError, pa.ArrowException),
        *(ValueError, TypeError, LookupError, AttributeError, RecursionError),
    ) as error:
        raise SourceError(f"{label}: its tables cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def _os_errors(label: str) -> Iterator[None]:
    """Turn errors of the operating system into a `BuildError` with a remedy."""
    try:
        yield
    except MemoryError as error:
        raise BuildError(f"{label}: out of memory, {memory_text()}; start again with fewer --workers") from error
    except OSError as error:
        why = "the disk is full; make room" if error.errno in {errno.ENOSPC, errno.EDQUOT} else str(error)
        raise BuildError(f"{label}: {why}; the same command continues: finished shards are kept") from error


def _run(
    waiting: list[Task],
    mine: list[Task],
    kept: dict[str, Part],
    processor: SampleProcessor,
    pool: WorkerPool | None,
    label: str,
) -> Generator[dict[str, Part | ShardFailure]]:
    """Build the waiting tasks. Yield all results so far, also after each task; stop after `MAX_FAILED` failures."""
    results: dict[str, Part | ShardFailure] = dict(kept)
    yield results
    total, left = (sum(len(task.groups) for task in tasks) for tasks in (mine, waiting))
    with (
        tqdm(total=total, initial=total - left, desc=label, unit="ex", mininterval=0.5) as bar,
        closing(build_all(waiting, processor, pool)) as running,
    ):
        for task, result in running:
            bar.update(len(task.groups))
            results[task.name] = result
            yield results
            if sum(isinstance(result, ShardFailure) for result in results.values()) > MAX_FAILED:
                return


def _parts_or_raise(label: str, results: dict[str, Part | ShardFailure]) -> dict[str, Part]:
    """The parts of all tasks.

    Raises:
        BuildError: a shard failed; all failures are listed.
    """
    failures = [result for result in results.values() if isinstance(result, ShardFailure)]
    if failures:
        listed = "".join(f"\n  {failure.shard}: {failure.reason}" for failure in failures)
        raise BuildError(f"{label}: {len(failures)} shards failed; --retry-failed builds them alone:{listed}")
    return {name: result for name, result in results.items() if isinstance(result, Part)}


def _index(
    row: Row,
    stage: Stage,
    settings: StageSettings,
    processor: SampleProcessor,
    build: dict[str, Any],
    parts: list[Part],
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
        fitted={name: sums[name] for name in FITTED},
        shards=tuple(ShardInfo(**part.shard) for part in parts),
    )


def _write_rejects(storage: Storage, parts: list[Part]) -> None:
    rejects = [reject for part in parts for reject in part.rejects]
    storage.write(REJECTS_NAME, b"".join(canonical_json(reject) + b"\n" for reject in rejects))


def _check_budget(storage: Storage, tasks: list[Task], results: dict[str, Part | ShardFailure], budget: float) -> None:
    """Raise a `BuildError` as soon as there are more rejects than the budget allows.

    Finished shards are kept: those that depend on a changed table or media file are made again. A shard with rejects
    that lacks the file of a URL is made again in any case, because the network may have been the reason.
    """
    parts = {name: part for name, part in sorted(results.items()) if isinstance(part, Part)}
    num_groups = sum(len(task.groups) for task in tasks)
    over = over_budget((reject for part in parts.values() for reject in part.rejects), budget * num_groups)
    if over is None:
        return
    cause, rejects = over
    _write_rejects(storage, list(parts.values()))
    for name, part in parts.items():
        unfetched = any(state is None and FETCHED.search(path) for path, state in part.media.items())
        if unfetched and not all(reject["omitted"] for reject in part.rejects):
            storage.remove(f"{name}.part.json")
    listed = "".join(f"\n  {kind.number} x {kind.reason}\n    {kind.example}" for kind in kinds(rejects)[:5])
    raise BuildError(
        f"{rejects[0]['dataset']}: {len(rejects)} rejects in {num_groups} groups of rows, "
        f"{budget:.1%} allowed because of {cause}:{listed}\n"
        f"all so far: {storage.root}/{REJECTS_NAME}; correct the source, or raise --reject-budget; "
        "finished shards are kept"
    )
