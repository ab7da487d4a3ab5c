"""Prefetch of samples along the plan: a worker starts its next reads in threads, within a budget of bytes.

The sampler knows every byte range to come and the worker that will read it, so each micro-batch carries the further
draws that its worker should start to read. Prefetching never changes a result: a draw without a prefetch is read when
it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, NamedTuple, TypeVar

from shards.storage.base import read_threads
from shards.stream.plan import Cursor, Draw, PackSpec

DEPTH = 8  # largest number of micro-batches that are prefetched for one worker
T = TypeVar("T")


class MicroSpec(NamedTuple):
    """One rank's micro-batch of a step before reading; `slot`: see `SlotRing`; `ahead`: draws to start reading now."""

    packs: tuple[PackSpec, ...]
    divisor: float
    cursor: Cursor
    ahead: tuple[Draw, ...] = ()
    slot: int | None = None

    @property
    def draws(self) -> list[Draw]:
        """The draws of all packs, one pack after another."""
        return [draw for pack in self.packs for draw in pack.draws]


def look_ahead(specs: Iterable[MicroSpec], lanes: int, budget: int) -> Iterator[MicroSpec]:
    """Yield the same micro-batches, each with the draws that its worker should start to read (`ahead`).

    Args:
        specs: micro-batches in the order of the plan; number i goes to worker i % lanes.
        lanes: number of workers; 1 if the process itself reads.
        budget: bytes of started and not yet used reads of all workers together; 0 disables the prefetch.
    """
    source = iter(specs)
    if not budget:
        yield from source
        return
    coming: deque[MicroSpec] = deque()
    begun = [0] * lanes  # for each lane: number of its next micro-batches that are already being read
    lane = 0
    while True:
        while len(coming) <= lanes * DEPTH and (spec := next(source, None)) is not None:
            coming.append(spec)
        if not coming:
            return
        spec = coming.popleft()
        begun[lane] = max(0, begun[lane] - 1)
        own = [coming[i] for i in range(lanes - 1, len(coming), lanes)]  # the next micro-batches of this lane
        held = sum(draw.span for later in own[: begun[lane]] for draw in later.draws)
        fresh: list[Draw] = []
        for later in own[begun[lane] :]:
            held += sum(draw.span for draw in later.draws)
            if held > budget // lanes:
                break
            fresh += later.draws
            begun[lane] += 1
        yield spec._replace(ahead=tuple(fresh))
        lane = (lane + 1) % lanes


class ReadAhead(Generic[T]):
    """The reads in flight of one process. `read` is called in threads; its errors are raised by `take`."""

    def __init__(self, read: Callable[[Draw], T]) -> None:
        self.read = read
        self.under_way: dict[Draw, Future[T]] = {}

    def begin(self, draws: Iterable[Draw]) -> None:
        """Start to read the draws that are not in flight yet."""
        for draw in draws:
            if draw not in self.under_way:
                self.under_way[draw] = read_threads().submit(self.read, draw)

    def take(self, draw: Draw) -> T:
        """Return the result for a draw and remove it."""
        begun = self.under_way.pop(draw, None)
        return self.read(draw) if begun is None else begun.result()

    def close(self) -> None:
        """Cancel the reads that have not started."""
        for future in self.under_way.values():
            future.cancel()
        self.under_way.clear()
