"""Reading along the plan before it is asked: what a worker will read next, begun in threads, within a budget of bytes.

The sampler knows every byte range to come and which worker it will go to, so it tells the worker with each micro-batch
which further draws to begin. Results do not depend on it: a draw that was not begun is read when it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, NamedTuple, TypeVar

from shards.storage.base import read_threads
from shards.stream.plan import Cursor, Draw, PackSpec

DEPTH = 8  # micro-batches of one worker, at most
T = TypeVar("T")


class MicroSpec(NamedTuple):
    """One rank's micro-batch of a step, before reading; `ahead`: draws of later ones, to begin reading now."""

    packs: tuple[PackSpec, ...]
    divisor: float
    cursor: Cursor
    ahead: tuple[Draw, ...] = ()

    @property
    def draws(self) -> list[Draw]:
        """Of all packs, one after another."""
        return [draw for pack in self.packs for draw in pack.draws]


def look_ahead(specs: Iterable[MicroSpec], lanes: int, budget: int) -> Iterator[MicroSpec]:
    """The same micro-batches, each with the draws that its worker should begin to read.

    Args:
        specs: in the order of the plan; number i goes to worker i % lanes.
        lanes: workers; 1 where the process itself reads.
        budget: bytes that all workers together may have begun and not yet used; 0 begins nothing.
    """
    source = iter(specs)
    if not budget:
        yield from source
        return
    coming: deque[MicroSpec] = deque()
    begun = [0] * lanes  # of each lane's next micro-batches, how many are begun
    lane = 0
    while True:
        while len(coming) <= lanes * DEPTH and (spec := next(source, None)) is not None:
            coming.append(spec)
        if not coming:
            return
        spec = coming.popleft()
        begun[lane] = max(0, begun[lane] - 1)
        own = [coming[i] for i in range(lanes - 1, len(coming), lanes)]  # this lane's next ones
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
    """Reads of one process that are under way. `read` is called in threads; its errors come when a draw is taken."""

    def __init__(self, read: Callable[[Draw], T]) -> None:
        self.read = read
        self.under_way: dict[Draw, Future[T]] = {}

    def begin(self, draws: Iterable[Draw]) -> None:
        """Begin to read what is not under way."""
        for draw in draws:
            if draw not in self.under_way:
                self.under_way[draw] = read_threads().submit(self.read, draw)

    def take(self, draw: Draw) -> T:
        """The result for a draw, which is then forgotten."""
        begun = self.under_way.pop(draw, None)
        return self.read(draw) if begun is None else begun.result()

    def close(self) -> None:
        """Give up what has not started."""
        for future in self.under_way.values():
            future.cancel()
        self.under_way.clear()
