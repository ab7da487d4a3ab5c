"""A batch on its way from a worker to the main process."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from shards.layout import VisualLayout
from shards.stream.collate import Batch
from shards.stream.plan import PlanSettings
from shards.stream.reader import Damage
from shards.stream.slots import ALIGNED, SlotRing, view_slot

TOKEN_BYTES = 48  # of a token in the seven tensors [B, S] of a batch, 41, and of a visual in two others


class Place(NamedTuple):
    """Where a tensor lies in a slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """A batch without its tensors: they lie in a slot, or, if there was none, came along as arrays.

    Attributes:
        slot: numbers of the ring and of the slot; None: there was none.
        tensors: where each tensor lies, or its values.
        others: the other fields.
    """

    slot: tuple[int, int] | None
    tensors: dict[str, Place | npt.NDArray[Any]]
    others: dict[str, Any]

    @property
    def masked(self) -> tuple[Damage, ...]:
        """See `Batch.masked`."""
        masked: tuple[Damage, ...] = self.others["masked"]
        return masked

    def open(self) -> Batch:
        """The batch, in the main process. Its tensors are views of the slot, which is in use as long as they are."""
        whole = None if self.slot is None else torch.frombuffer(view_slot(*self.slot), dtype=torch.uint8)
        opened: dict[str, Any] = {}
        for name, value in self.tensors.items():
            if isinstance(value, Place):
                assert whole is not None
                size = math.prod(value.shape) * value.dtype.itemsize
                opened[name] = whole[value.start : value.start + size].view(value.dtype).view(value.shape)
            else:
                opened[name] = torch.from_numpy(value)
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
        return SharedBatch(None, {name: tensor.numpy() for name, tensor in tensors.items()}, others)
    base = ring.address(slot)
    places = {
        name: Place(tensor.dtype, tuple(tensor.shape), tensor.data_ptr() - base if tensor.numel() else 0)
        for name, tensor in tensors.items()
    }
    return SharedBatch((ring.number, slot), {**places}, others)


def batch_bytes(layout: VisualLayout, settings: PlanSettings, micro_batch: int) -> int:
    """The most bytes of a micro-batch: of its tokens, each with a row of the pooling table, and of its crops."""
    pooling = 8 * max(layout.image_pool, layout.video_pool) ** 2
    pack = settings.sequence_length * (TOKEN_BYTES + pooling) + settings.max_crops * (3 * layout.crop_size**2 + 16)
    return micro_batch * pack + 16 * ALIGNED
