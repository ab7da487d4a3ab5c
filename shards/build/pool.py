"""The processes that build shards: each has its own processor and ends with the process that began it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from shards.build.task import Failure, Part, Processor, ProcessorFactory, Task, try_shard


@contextmanager
def worker_pool(make_processor: ProcessorFactory, workers: int) -> Iterator[Executor | None]:
    """Processes for `build_dataset`, for any number of datasets of one stage; None for a single worker."""
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks of the decoders' and of arrow's threads
    with ProcessPoolExecutor(workers, context, _start_worker, (make_processor,)) as pool:
        yield pool


def build_all(tasks: list[Task], processor: Processor, pool: Executor | None) -> Generator[tuple[Task, Part | Failure]]:
    """What becomes of tasks, in the order in which they are done; after it is closed no further one is begun."""
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
            future.cancel()  # after an error no further shard is begun; those in work are finished


_processor: Processor | None = None


def _start_worker(make_processor: ProcessorFactory) -> None:
    global _processor
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, which resizes images
    threading.Thread(target=_follow_parent, daemon=True).start()
    _processor = make_processor()


def _follow_parent() -> None:
    """End with the main process: a pool's workers would outlive one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_in_worker(task: Task) -> Part | Failure:
    assert _processor is not None
    return try_shard(task, _processor)
