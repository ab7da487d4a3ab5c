"""The worker processes that build shards: each has its own processor, and exits when the main process ends.

A worker that is killed, most often for memory, breaks its pool. The pool is then made anew, and each shard that was in
work is built once more with no other beside it. If that kills a worker again, the shard is recorded as failed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from shards.build.task import Part, ProcessorFactory, SampleProcessor, ShardFailure, Task, record_failure, try_shard
from shards.machine import memory_text
from shards.storage.local import LocalStorage
from shards.storage.open import open_storage

Result = Part | ShardFailure
START_METHOD = "spawn"  # fork would copy locks that threads of decoders and arrow hold


class WorkerPool:
    """Processes that build shards; `renew` replaces them after one was killed."""

    def __init__(self, make_processor: ProcessorFactory, workers: int) -> None:
        self.make_processor, self.workers = make_processor, workers
        self.executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context(START_METHOD)
        return ProcessPoolExecutor(self.workers, context, _start_worker, (self.make_processor,))

    def submit(self, task: Task) -> Future[Result]:
        """Start a task; a pool that broke since the last result is replaced first."""
        try:
            return self.executor.submit(_build_in_worker, task)
        except BrokenProcessPool:
            self.renew()
            return self.executor.submit(_build_in_worker, task)

    def renew(self) -> None:
        """Replace the processes."""
        self.executor.shutdown(cancel_futures=True)
        self.executor = self._start()


@contextmanager
def worker_pool(make_processor: ProcessorFactory, workers: int) -> Iterator[WorkerPool | None]:
    """A process pool for `build_dataset`, usable for all datasets of one stage; None if `workers` is 1."""
    if workers <= 1:
        yield None
        return
    pool = WorkerPool(make_processor, workers)
    try:
        yield pool
    finally:
        pool.executor.shutdown()


def build_all(
    tasks: list[Task], processor: SampleProcessor, pool: WorkerPool | None
) -> Generator[tuple[Task, Part | ShardFailure]]:
    """Build tasks and yield the results in the order of completion; after closing, no further task is started."""
    if pool is None:
        for task in tasks:
            yield task, try_shard(task, processor)
        return
    waiting, running = deque(tasks), dict[Future[Result], Task]()
    try:
        while waiting or running:
            # At most one task per process is started: one of these broke a broken pool, and no other task.
            while waiting and len(running) < pool.workers:
                task = waiting.popleft()
                running[pool.submit(task)] = task
            interrupted = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    interrupted.append(task)
                else:
                    yield task, result
            if interrupted:
                for future, task in running.items():  # the pool is broken: none of these can end any more
                    future.cancel()
                    interrupted.append(task)
                running.clear()
                yield from _retry_alone(interrupted, pool)
    finally:
        for future in running:
            future.cancel()  # after an error no further shard is started; running ones finish


def _retry_alone(tasks: list[Task], pool: WorkerPool) -> Iterator[tuple[Task, Result]]:
    """Build the tasks of a broken pool one after the other in a new one."""
    pool.renew()
    for task in tasks:
        _remove_temporary_tar(task)
    for task in sorted(tasks, key=lambda task: task.name):
        yield task, _build_alone(task, pool)


def _build_alone(task: Task, pool: WorkerPool) -> Result:
    try:
        return pool.submit(task).result()
    except BrokenProcessPool:
        pool.renew()
        _remove_temporary_tar(task)
        return record_failure(
            task,
            "its worker was killed twice, the second time with no other shard in work, most often for memory: "
            f"{memory_text()}; use fewer examples_per_shard, smaller media, or a machine with more memory",
        )


def _remove_temporary_tar(task: Task) -> None:
    """Remove what a killed worker had written of a shard; in a bucket there is nothing."""
    if isinstance(storage := open_storage(task.out), LocalStorage):
        for path in Path(storage.root).glob(f".{task.name}.*.tmp"):
            path.unlink(missing_ok=True)


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
