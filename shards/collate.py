"""Packs of read samples to a batch of tensors: expand, decode, lay one after another.

A sample that could not be read is masked: its place in the row is padding, and nothing else moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.layout import Expanded, VisualLayout, expand, split_crops, visual_pooling
from shards.media import decode_jpeg
from shards.plan import Cursor, Draw, PackSpec
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
        dataset_ids: int64 [B, S], which of `Plan.datasets` a token comes from; 0 in padding.
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
    dataset_ids: Tensor
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedSample:
    """One sample ready to be laid in a row: its tokens, and per visual its crops and what its tokens pool.

    Attributes:
        tokens: see `layout.Expanded`.
        crops: one uint8 [crops, crop, crop, 3] per visual.
        pooling: one int64 [visual tokens, pool ** 2] per visual, counting from the visual's own first patch; -1 pads.
    """

    tokens: Expanded
    crops: tuple[Pixels, ...]
    pooling: tuple[npt.NDArray[np.int64], ...]


def decode_sample(layout: VisualLayout, draw: Draw, sample: StoredSample) -> DecodedSample:
    """Expand a sample's tokens and decode its images.

    Raises:
        ReadError: other lengths than the plan packed by, or an image is missing, no JPEG, or of another size.
    """
    try:
        tokens = expand(layout, sample.tokens, sample.visuals)
        crops = tuple(decode_crops(layout, sample))
        pooling = tuple(visual_pooling(layout, visual) for visual in sample.visuals)
    except (KeyError, TypeError, ValueError) as error:
        raise ReadError(f"{type(error).__name__}: {error}") from None
    found = (len(tokens.input_ids), sum(map(len, crops)))
    if found != (draw.num_tokens, draw.num_crops):
        raise ReadError(
            f"{found[0]} tokens and {found[1]} crops, the index says {draw.num_tokens} and {draw.num_crops}; "
            "build the dataset again"
        )
    if tokens.branch.max() >= TRUNK:
        raise ReadError(f"{tokens.branch.max()} annotations, at most {TRUNK - 1} fit a mask")
    return DecodedSample(tokens=tokens, crops=crops, pooling=pooling)


def decode_crops(layout: VisualLayout, sample: StoredSample) -> Iterator[Pixels]:
    """Crops of every visual, uint8 [crops, crop, crop, 3] each.

    Raises:
        ValueError: an image is no JPEG, or not of the size that its tiling says; KeyError: there is no such image.
    """
    decoded: dict[int, Pixels] = {}  # an image of one tile has one file for view and canvas

    def decode(number: int, height: int, width: int) -> Pixels:
        if number not in decoded:
            decoded[number] = decode_jpeg(sample.images[number])
        if decoded[number].shape != (height, width, 3):
            raise ValueError(f"image {number} is {decoded[number].shape}, its tiling says {(height, width, 3)}")
        return decoded[number]

    for visual in sample.visuals:
        view = decode(visual["view"], layout.crop_size, layout.crop_size)
        if visual["kind"] == "frame":
            yield view[None]
        else:
            tiling = (visual["tiling"][0], visual["tiling"][1])
            yield split_crops(layout, tiling, view, decode(visual["canvas"], *layout.canvas_size(tiling)))


def collate(
    layout: VisualLayout,
    packs: Sequence[PackSpec],
    samples: Sequence[Sequence[DecodedSample | Damage]],
    sequence_length: int,
    divisor: float,
    cursor: Cursor,
) -> Batch:
    """A batch of packs; `samples[i][j]` is draw j of pack i, or what was wrong with it."""
    fields: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.zeros((len(packs), sequence_length), np.int64),
        "labels": np.zeros((len(packs), sequence_length), np.int64),
        "loss_weights": np.zeros((len(packs), sequence_length), np.float32),
        "position_ids": np.zeros((len(packs), sequence_length), np.int64),
        "segment_ids": np.full((len(packs), sequence_length), PAD_SEGMENT, np.int32),
        "is_visual": np.zeros((len(packs), sequence_length), np.bool_),
        "dataset_ids": np.zeros((len(packs), sequence_length), np.int64),
    }
    kept, masked = [], []
    for row, (pack, members) in enumerate(zip(packs, samples, strict=True)):
        start = 0
        for member, (draw, sample) in enumerate(zip(pack.draws, members, strict=True)):
            place = (row, slice(start, start + draw.num_tokens))
            start += draw.num_tokens
            if isinstance(sample, Damage):
                masked.append(sample)
                continue
            kept.append(sample)
            tokens = sample.tokens
            fields["input_ids"][place] = tokens.input_ids
            fields["labels"][place] = tokens.labels
            fields["loss_weights"][place] = tokens.weights
            fields["position_ids"][place] = tokens.position_ids
            branch = tokens.branch.astype(np.int32)  # int16 is too small for MEMBER
            fields["segment_ids"][place] = member * MEMBER + np.where(branch == 0, TRUNK, branch)
            fields["is_visual"][place] = tokens.is_visual
            fields["dataset_ids"][place] = draw.dataset
    arrays = fields | _visual_fields(layout, kept)
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        step=packs[0].step,
        slots=tuple(pack.slot for pack in packs),
        divisor=divisor,
        cursor=cursor,
        masked=tuple(masked),
    )


def _visual_fields(layout: VisualLayout, samples: Sequence[DecodedSample]) -> dict[str, npt.NDArray[Any]]:
    """The visual arrays of a batch; with no visual at all they are empty."""
    crops = [part for sample in samples for part in sample.crops]
    pooling = [part for sample in samples for part in sample.pooling]
    width = max((part.shape[1] for part in pooling), default=layout.image_pool**2)
    flat = np.full((sum(map(len, pooling)), width), -1, np.int64)
    token = patch = 0
    for part, pixels in zip(pooling, crops, strict=True):
        flat[token : token + len(part), : part.shape[1]] = np.where(part >= 0, part + patch, -1)
        token, patch = token + len(part), patch + len(pixels) * layout.crop_patches**2
    empty = np.zeros((0, layout.crop_size, layout.crop_size, 3), np.uint8)
    return {
        "pixels": np.concatenate([empty, *crops]),
        "pooling": flat,
        "visual_crops": np.array([len(pixels) for pixels in crops], np.int64),
        "visual_tokens": np.array([len(part) for part in pooling], np.int64),
    }
