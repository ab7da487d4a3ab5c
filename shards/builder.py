"""Building a dataset, shard by shard, in a process pool, continued where it was killed.

A dataset is cut into shards by groups of rows, before anything is decoded, so the cut depends on the rows alone and
not on the number of workers. One task is one shard (`shards.build_task`); it is finished when its tar, its sidecar and
its part are there and belong to the same build. `index.json` closes the dataset.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shards.build_folder import BuildError, claim, locked
from shards.build_task import Part, Processor, ProcessorFactory, Task, build_shard, finished
from shards.catalog import Row, Stage, StageSettings
from shards.convert import CONVERTERS
from shards.convert.reading import open_rows
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
from shards.storage import LocalStorage

REJECT_BUDGET = 0.05  # rejects over groups of rows
BUILD_VERSION = 2  # raise it when converters or writer make other samples of the same settings


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
    with _explained(label), locked(out):
        storage = LocalStorage(out)
        claim(storage, build, overwrite)
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


def _run(
    tasks: list[Task], storage: LocalStorage, processor: Processor, pool: Executor | None, label: str
) -> Generator[tuple[Task, Part]]:
    """The parts of all tasks, those of finished shards first, the others when they are built."""
    done = [(task, part) for task in tasks if (part := finished(task, storage)) is not None]
    yield from done
    names = {task.name for task, _ in done}
    waiting = [task for task in tasks if task.name not in names]
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
            yield task, build_shard(task, processor)
        return
    futures = {pool.submit(_build_in_worker, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()  # after an error no further shard is begun; those in work are finished


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
    return build_shard(task, _processor)
