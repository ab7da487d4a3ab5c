"""Memory that workers and the main process share, in which a worker builds a batch and hands it over without a copy.

A slot is anonymous memory that is mapped before the workers are forked. It is not in /dev/shm, whose size containers
limit, and its pages are used again for later batches: fresh pages for every batch cost a worker more than all of its
own work on text. The main process gets views of a slot, and the slot is free again when the last of them is gone.
What a batch is, and the way of one that got no slot, is in `shards.stream.shared`.
"""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNED = 64  # bytes to which the arrays of a batch are aligned
KEPT = 2  # batches of each worker that the main process may hold while the worker builds further ones
_RINGS: weakref.WeakValueDictionary[int, SlotRing] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SlotRing:
    """The slots of one loader, of `size` bytes each: `prefetch + KEPT` for each worker."""

    def __init__(self, workers: int, prefetch: int, size: int) -> None:
        self.number = next(_NUMBERS)
        self.slots = [mmap.mmap(-1, size) for _ in range(workers * (prefetch + KEPT))]
        # A worker gets its own slots again, whose pages it has mapped already.
        self.free = [deque(range(worker, len(self.slots), workers)) for worker in range(workers)]
        _RINGS[self.number] = self

    def take(self, worker: int) -> int | None:
        """A free slot of a worker; None if all are in use."""
        return self.free[worker].popleft() if self.free[worker] else None

    def address(self, slot: int) -> int:
        """The address of a slot in this process."""
        return np.frombuffer(self.slots[slot], np.uint8).ctypes.data

    def view(self, slot: int) -> memoryview:
        """The memory of a slot, for the main process; the slot is free when nothing refers to it any more."""
        view = memoryview(self.slots[slot])
        weakref.finalize(view, self.free[slot % len(self.free)].append, slot)
        return view


def view_slot(ring: int, slot: int) -> memoryview:
    """`SlotRing.view` of the ring with this number, in the process that made it."""
    return _RINGS[ring].view(slot)


class Arena:
    """Arrays one after another in a slot; without a slot, arrays of their own."""

    def __init__(self, ring: SlotRing | None = None, slot: int | None = None) -> None:
        self.place = None if ring is None or slot is None else (ring.number, slot)
        self.buffer = None if ring is None or slot is None else np.frombuffer(ring.slots[slot], np.uint8)
        self.used = 0

    def full(self, shape: tuple[int, ...], dtype: npt.DTypeLike, value: float | None) -> npt.NDArray[Any]:
        """An array filled with a value, or not filled."""
        if self.buffer is None:
            return np.empty(shape, dtype) if value is None else np.full(shape, value, dtype)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = self.buffer[self.used : self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // ALIGNED) * ALIGNED
        if value is not None:
            array.fill(value)
        return array
