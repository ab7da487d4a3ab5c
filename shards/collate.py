"""Packs of read samples to a batch of tensors: expand, decode, lay one after another.

A sample that could not be read is masked: its place in the row is padding, and nothing else moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.layout import VisualLayout, expand, split_crops, visual_crops, visual_pooling
from shards.media import decode_jpeg
from shards.plan import Cursor, PackSpec
from shards.reader import Damage, ReadError, StoredSample

MEMBER = 100_000  # segment ids of one member of a pack lie in [number * MEMBER, (number + 1) * MEMBER)
TRUNK = 10_000  # the shared trunk: above every branch, since a query sees segments that are not below its own
PAD_SEGMENT = 2**31 - 1
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. B packs of S tokens, N crops, T visual tokens, U visuals (images or frames).

    Attributes:
        input_ids: int64 [B, S].
        labels: int64 [B, S], already shifted: `labels[i]` is what token i predicts.
        loss_weights: float32 [B, S], 0 where nothing is predicted.
        position_ids: int64 [B, S]; every branch continues from the end of its trunk.
        segment_ids: int32 [B, S]: member * MEMBER + (TRUNK, or the branch's number); padding is PAD_SEGMENT.
        is_visual: bool [B, S], tokens that see each other in both directions.
        pixels: uint8 [N, crop, crop, 3].
        pooling: int64 [T, P], patches in the flat [N * patches] axis that each `<im_patch>` pools; -1 pads.
        visual_crops, visual_tokens: int64 [U], crops and visual tokens of every visual, in order.
        step, slots: where these packs stand in the plan.
        divisor: the sum of loss weights of the whole step, all ranks and micro-batches.
        cursor: the state of the data after this step.
        masked: samples that were damaged.
    """

    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    is_visual: Tensor
    pixels: Tensor
    pooling: Tensor
    visual_crops: Tensor
    visual_tokens: Tensor
    step: int
    slots: tuple[int, ...]
    divisor: float
    cursor: Cursor
    masked: tuple[Damage, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed)


def sample_crops(layout: VisualLayout, sample: StoredSample) -> list[Pixels]:
    """Decoded crops of every visual, uint8 [crops, crop, crop, 3] each.

    Raises:
        ReadError: an image is missing, no JPEG, or not of the size that its tiling says.
    """

    def decode(number: int, height: int, width: int) -> Pixels:
        if number not in images:
            try:
                images[number] = decode_jpeg(sample.images[number])
            except (KeyError, ValueError) as error:
                raise ReadError(f"sample {sample.key}, image {number}: {error}") from None
        if images[number].shape != (height, width, 3):
            raise ReadError(f"sample {sample.key}, image {number}: {images[number].shape}, wanted {(height, width, 3)}")
        return images[number]

    images: dict[int, Pixels] = {}
    size, crops = layout.crop_size, []
    for visual in sample.visuals:
        view = decode(visual["view"], size, size)
        if visual["kind"] == "frame":
            crops.append(view[None])
        else:
            tiling = tuple(visual["tiling"])
            crops.append(split_crops(layout, tiling, view, decode(visual["canvas"], *layout.canvas_size(tiling))))
    return crops


class _Rows:
    """A batch under construction: rows of padding, and visuals that grow sample by sample."""

    def __init__(self, layout: VisualLayout, num_rows: int, length: int) -> None:
        self.layout = layout
        self.fields: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.zeros((num_rows, length), np.int64),
            "labels": np.zeros((num_rows, length), np.int64),
            "loss_weights": np.zeros((num_rows, length), np.float32),
            "position_ids": np.zeros((num_rows, length), np.int64),
            "segment_ids": np.full((num_rows, length), PAD_SEGMENT, np.int32),
            "is_visual": np.zeros((num_rows, length), np.bool_),
        }
        self.crops: list[Pixels] = []
        self.pooling: list[npt.NDArray[np.int64]] = []
        self.num_patches = 0

    def add(self, row: int, start: int, member: int, sample: StoredSample, crops: list[Pixels]) -> None:
        """Place one sample at column `start` of a row."""
        tokens = expand(self.layout, sample.tokens, sample.visuals)
        values = {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "loss_weights": tokens.weights,
            "position_ids": tokens.position_ids,
            "segment_ids": member * MEMBER + np.where(tokens.branch == 0, TRUNK, tokens.branch.astype(np.int32)),
            "is_visual": tokens.is_visual,
        }
        for name, value in values.items():
            self.fields[name][row, start : start + len(value)] = value
        for visual, pixels in zip(sample.visuals, crops, strict=True):
            local = visual_pooling(self.layout, visual)
            self.pooling.append(np.where(local >= 0, local + self.num_patches, -1))
            self.num_patches += visual_crops(visual) * self.layout.crop_patches**2
            self.crops.append(pixels)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors; with no visual at all the visual ones are empty."""
        size, width = self.layout.crop_size, max((p.shape[1] for p in self.pooling), default=self.layout.image_pool**2)
        pooling = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in self.pooling]
        arrays = {
            **self.fields,
            "pixels": np.concatenate([np.zeros((0, size, size, 3), np.uint8), *self.crops]),
            "pooling": np.concatenate([np.zeros((0, width), np.int64), *pooling]),
            "visual_crops": np.array([len(pixels) for pixels in self.crops], np.int64),
            "visual_tokens": np.array([len(p) for p in self.pooling], np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate(
    layout: VisualLayout,
    packs: Sequence[PackSpec],
    samples: Sequence[Sequence[tuple[StoredSample, list[Pixels]] | Damage]],
    sequence_length: int,
    divisor: float,
    cursor: Cursor,
) -> Batch:
    """A batch of packs; `samples[i][j]` is draw j of pack i with its decoded crops, or what was wrong with it."""
    rows = _Rows(layout, len(packs), sequence_length)
    masked = []
    for row, (spec, members) in enumerate(zip(packs, samples, strict=True)):
        start = 0
        for member, (draw, sample) in enumerate(zip(spec.draws, members, strict=True)):
            if isinstance(sample, Damage):
                masked.append(sample)
            else:
                rows.add(row, start, member, *sample)
            start += draw.num_tokens
    return Batch(
        **rows.tensors(),
        step=packs[0].step,
        slots=tuple(spec.slot for spec in packs),
        divisor=divisor,
        cursor=cursor,
        masked=tuple(masked),
    )
