"""Memory that workers and the main process share, in which a worker builds a batch and hands it over without a copy.

A slot is anonymous memory that is mapped before the workers are forked. It is not in /dev/shm, whose size containers
limit, and its pages are used again for later batches: fresh pages for every batch cost a worker more than all of its
own work on text. The main process gets views of a slot, and the slot is free again when the last of them is gone.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shards.layout import VisualLayout
from shards.stream.collate import ALIGNED, Batch
from shards.stream.plan import PlanSettings
from shards.stream.reader import Damage

KEPT = 2  # batches of each worker that the main process may hold while the worker builds further ones
_RINGS: weakref.WeakValueDictionary[int, SlotRing] = weakref.WeakValueDictionary()


class SlotRing:
    """The slots of one loader, of `size` bytes each: `prefetch + KEPT` for each worker."""

    def __init__(self, workers: int, prefetch: int, size: int) -> None:
        self.number = id(self)
        self.slots = [mmap.mmap(-1, size) for _ in range(workers * (prefetch + KEPT))]
        # A worker gets its own slots again, whose pages it has mapped already.
        self.free = [deque(range(worker, len(self.slots), workers)) for worker in range(workers)]
        _RINGS[self.number] = self

    def take(self, worker: int) -> int | None:
        """A free slot of a worker; None if all are in use."""
        return self.free[worker].popleft() if self.free[worker] else None

    def view(self, slot: int) -> memoryview:
        """The memory of a slot, for the main process; the slot is free when nothing refers to it any more."""
        view = memoryview(self.slots[slot])
        weakref.finalize(view, self.free[slot % len(self.free)].append, slot)
        return view


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """A batch on its way to the main process: its tensors lie in a slot, or, if there was none, come as arrays.

    Attributes:
        slot: numbers of the ring and of the slot; None: there was none.
        tensors: dtype, shape and first byte of each tensor, or its values.
        masked: see `Batch`.
        others: the other fields.
    """

    slot: tuple[int, int] | None
    tensors: dict[str, Any]
    masked: tuple[Damage, ...]
    others: dict[str, Any]

    def open(self) -> Batch:
        """The batch, in the main process. Its tensors are views of the slot, which is in use as long as they are."""
        if self.slot is None:
            arrays: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.tensors.items()}
            return Batch(**self.others, **arrays)
        whole = torch.frombuffer(_RINGS[self.slot[0]].view(self.slot[1]), dtype=torch.uint8)
        opened: dict[str, Any] = {
            name: whole[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (dtype, shape, start) in self.tensors.items()
        }
        return Batch(**self.others, **opened)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for which torch asks where there is a GPU; the slot is free then."""
        return self.open().pin_memory()


def share(batch: Batch, ring: SlotRing, slot: int | None) -> SharedBatch:
    """What a worker sends in place of a batch, whose tensors lie in a slot if it had one."""
    tensors = batch.tensors()
    others = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in tensors}
    if slot is None:
        # By value: torch would use /dev/shm, and where that is full drop the batch, for which the main process waits.
        return SharedBatch(None, {name: tensor.numpy() for name, tensor in tensors.items()}, batch.masked, others)
    base = np.frombuffer(ring.slots[slot], np.uint8).ctypes.data
    starts = {name: tensor.data_ptr() - base if tensor.numel() else 0 for name, tensor in tensors.items()}
    places = {name: (tensor.dtype, tuple(tensor.shape), starts[name]) for name, tensor in tensors.items()}
    return SharedBatch((ring.number, slot), places, batch.masked, others)


def batch_bytes(layout: VisualLayout, settings: PlanSettings, micro_batch: int) -> int:
    """The most bytes of a micro-batch: of its tokens, each with a row of the pooling table, and of its crops."""
    token = 48 + 8 * max(layout.image_pool, layout.video_pool) ** 2  # the seven tensors [B, S] have 41
    pack = settings.sequence_length * token + settings.max_crops * (3 * layout.crop_size**2 + 16)
    return micro_batch * pack + 16 * ALIGNED
