"""The worker processes that build shards: each has its own processor, and exits when the main process ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from shards.build.task import Part, ProcessorFactory, SampleProcessor, ShardFailure, Task, try_shard


@contextmanager
def worker_pool(make_processor: ProcessorFactory, workers: int) -> Iterator[Executor | None]:
    """A process pool for `build_dataset`, usable for all datasets of one stage; None if `workers` is 1."""
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # fork would copy held locks of threads in decoders and arrow
    with ProcessPoolExecutor(workers, context, _start_worker, (make_processor,)) as pool:
        yield pool


def build_all(
    tasks: list[Task], processor: SampleProcessor, pool: Executor | None
) -> Generator[tuple[Task, Part | ShardFailure]]:
    """Build tasks and yield the results in the order of completion; after closing, no further task is started."""
    if pool is None:
        for task in tasks:
            yield task, try_shard(task, processor)
        return
    futures = {pool.submit(_build_in_worker, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()  # after an error no further shard is started; running ones finish


_processor: SampleProcessor | None = None


def _start_worker(make_processor: ProcessorFactory) -> None:
    global _processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import; it resizes images
    threading.Thread(target=_follow_parent, daemon=True).start()
    _processor = make_processor()


def _follow_parent() -> None:
    """Exit when the main process ends; otherwise the workers would outlive a killed main process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_in_worker(task: Task) -> Part | ShardFailure:
    assert _processor is not None
    return try_shard(task, _processor)
