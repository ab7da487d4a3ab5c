"""Collating packs of samples into a batch of tensors: expand tokens, decode images, concatenate.

A sample that could not be read is masked: its place in the row becomes padding, and the others keep their places. A
rank decodes only the images and frames of its own split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.format import ODD_SAMPLE
from shards.layout import Expanded, VisualLayout, allowed_pairs, expand, split_crops, visual_crops, visual_pooling
from shards.media.jpeg import decode_jpeg, jpeg_size
from shards.split import split_visuals
from shards.stream.plan import Cursor, Draw, PackSpec
from shards.stream.reader import Damage, ReadError, StoredSample

MEMBER = 100_000  # segment ids of one member of a pack lie in [number * MEMBER, (number + 1) * MEMBER)
TRUNK = 10_000  # segment of the shared trunk; above every branch, because a token attends to segments >= its own
PAD_SEGMENT = 2**31 - 1  # segment id of padding
ALIGNED = 64  # bytes to which the arrays of a batch are aligned
Pixels = npt.NDArray[np.uint8]


class Arena:
    """Arrays one after another in a buffer; without a buffer, arrays of their own."""

    def __init__(self, buffer: mmap | None = None) -> None:
        self.buffer = None if buffer is None else np.frombuffer(buffer, np.uint8)
        self.used = 0

    def full(self, shape: tuple[int, ...], dtype: npt.DTypeLike, value: float | None) -> npt.NDArray[Any]:
        """An array filled with a value, or not filled."""
        if self.buffer is None:
            return np.empty(shape, dtype) if value is None else np.full(shape, value, dtype)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        array = self.buffer[self.used : self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // ALIGNED) * ALIGNED
        if value is not None:
            array.fill(value)
        return array


class ReadStats(NamedTuple):
    """Seconds to read and to decode each sample of a batch, and the counts of `tally` since the previous batch."""

    read: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()
    counts: Mapping[str, int] = {}


NO_READS = ReadStats()


class WorkSizes(NamedTuple):
    """Sizes that determine the model's operations, beside the shapes of the tensors; masked samples do not count.

    They are of all ranks of a group, and counted on the host, so that a GPU need not be asked for them.
    """

    crops: int = 0  # ViT inputs
    pairs: int = 0  # (query, key) pairs of tokens that the attention mask allows
    loss_tokens: int = 0  # tokens with a loss weight


NO_WORK = WorkSizes()  # the sizes of a batch that was made by hand are not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. B packs of S tokens, N crops, T visual tokens, U visuals (images or frames).

    In a sequence-parallel group a rank holds only the crops of its own split of the visuals; other fields are whole.

    Attributes:
        input_ids: int64 [B, S].
        labels: int64 [B, S], already shifted: `labels[i]` is what token i predicts.
        loss_weights: float32 [B, S], 0 where nothing is predicted.
        position_ids: int64 [B, S]; every branch continues from the end of its trunk.
        segment_ids: int32 [B, S]: member * MEMBER + (TRUNK, or the branch's number); padding is PAD_SEGMENT.
        is_visual: bool [B, S], tokens that attend to each other in both directions.
        dataset_ids: int64 [B, S], index into `Plan.datasets` of the dataset of a token; 0 in padding.
        pixels: uint8 [own crops, crop, crop, 3].
        pooling: int64 [T, P], patches in the flat [N * patches] axis that each `<im_patch>` pools; -1 pads.
        visual_crops, visual_tokens: int64 [U], crops and visual tokens of every visual, in order.
        step, slots: position of these packs in the plan.
        divisor: sum of the loss weights of the whole step, over all ranks and micro-batches.
        cursor: state of the data after this step.
        masked: samples that were damaged and are padding in the batch.
        reads: timings and counts of reading the samples.
        work: sizes that determine the model's operations.
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
    reads: ReadStats = NO_READS
    work: WorkSizes = NO_WORK

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(value) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **changed)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSample:
    """One sample with its tokens expanded and its images still JPEG.

    Attributes:
        draw, stored: the draw, and the sample as it was read.
        tokens: see `layout.Expanded`.
        num_crops: number of crops of every visual.
        pooling: one int64 [visual tokens, pool ** 2] per visual, counting from the visual's own first patch; -1 pads.
    """

    draw: Draw
    stored: StoredSample
    tokens: Expanded
    num_crops: tuple[int, ...]
    pooling: tuple[npt.NDArray[np.int64], ...]


def open_sample(layout: VisualLayout, draw: Draw, sample: StoredSample) -> OpenedSample:
    """Expand a sample's tokens.

    Raises:
        ReadError: the lengths differ from those that the plan packed by, or a token or visual is odd.
    """
    try:
        num_crops = tuple(visual_crops(visual) for visual in sample.visuals)
        if sum(num_crops) > draw.num_crops:  # compared first, since a tiling could fill the memory
            raise ValueError(f"{sum(num_crops)} crops, the index says {draw.num_crops}")
        tokens = expand(layout, sample.tokens, sample.visuals)
        pooling = tuple(visual_pooling(layout, visual) for visual in sample.visuals)
    except ODD_SAMPLE as error:
        raise ReadError(f"{type(error).__name__}: {error}") from None
    lengths = (len(tokens.input_ids), sum(num_crops))
    if lengths != (draw.num_tokens, draw.num_crops):
        raise ReadError(
            f"{lengths[0]} tokens and {lengths[1]} crops, the index says {draw.num_tokens} and {draw.num_crops}; "
            "build the dataset again"
        )
    if tokens.branch.max() >= TRUNK:
        raise ReadError(f"{tokens.branch.max()} annotations, at most {TRUNK - 1} fit a mask")
    return OpenedSample(draw=draw, stored=sample, tokens=tokens, num_crops=num_crops, pooling=pooling)


def decode_crops(layout: VisualLayout, sample: StoredSample, visuals: Sequence[int], out: Pixels) -> None:
    """Decode the crops of some of a sample's visuals into `out`, uint8 [crops, crop, crop, 3].

    Raises:
        ReadError: an image is missing, is not a JPEG, or does not have the size that its tiling requires.
    """

    def decode(number: int, height: int, width: int, into: Pixels | None = None) -> Pixels:
        size = jpeg_size(sample.images[number])  # in the header: a small file could be of any size
        if size != (height, width):
            raise ValueError(f"image {number} is {size}, its tiling says {(height, width)}")
        return decode_jpeg(sample.images[number], into)

    start = 0
    try:
        for visual in map(sample.visuals.__getitem__, visuals):
            crops = out[start : start + visual_crops(visual)]
            start += len(crops)
            view = decode(visual["view"], layout.crop_size, layout.crop_size, crops[0])
            if visual["kind"] != "frame":
                tiling = (visual["tiling"][0], visual["tiling"][1])
                # The view and the canvas of an image of one tile are the same file.
                same = visual["canvas"] == visual["view"] and layout.canvas_size(tiling) == view.shape[:2]
                canvas = view if same else decode(visual["canvas"], *layout.canvas_size(tiling))
                split_crops(layout, tiling, view, canvas, crops)
    except ODD_SAMPLE as error:
        raise ReadError(f"{type(error).__name__}: {error}") from None


def own_visuals(samples: Sequence[OpenedSample], rank: int, ranks: int) -> Iterator[tuple[OpenedSample, list[int]]]:
    """Yield every sample with the numbers of its visuals that are in the split of rank `rank` of `ranks`."""
    crops = [count for sample in samples for count in sample.num_crops]
    tokens = [len(part) for sample in samples for part in sample.pooling]
    own, first = split_visuals(crops, tokens, ranks)[rank].visuals, 0
    for sample in samples:
        last = first + len(sample.num_crops)
        yield sample, (own[(own >= first) & (own < last)] - first).tolist()
        first = last


def odd_weights(samples: Sequence[OpenedSample]) -> list[OpenedSample]:
    """Samples whose loss weights do not sum to the index's, or hold a negative, infinite or undefined one."""
    weights = np.concatenate([sample.stored.tokens["weight"] for sample in samples]).astype(np.float64)
    starts = np.cumsum([0, *(len(sample.stored.tokens) for sample in samples[:-1])])
    wanted = np.array([sample.draw.loss_weight for sample in samples])
    close = np.isclose(np.add.reduceat(weights, starts), wanted, rtol=1e-6, atol=0)
    close &= np.minimum.reduceat(weights, starts) >= 0
    return [samples[number] for number in np.flatnonzero(~close).tolist()]


def own_crops(batch: Batch, rank: int, ranks: int) -> Batch:
    """Reduce a batch that holds all crops to the crops of one rank's split."""
    split = split_visuals(batch.visual_crops.tolist(), batch.visual_tokens.tolist(), ranks)[rank]
    return dataclasses.replace(batch, pixels=batch.pixels[torch.from_numpy(split.crops)])


def collate(
    layout: VisualLayout,
    packs: Sequence[PackSpec],
    samples: Sequence[OpenedSample | Damage],
    pixels: Pixels,
    sequence_length: int,
    divisor: float,
    cursor: Cursor,
    reads: ReadStats = NO_READS,
    arena: Arena | None = None,
) -> Batch:
    """Build the batch of some packs.

    Args:
        layout: the model's geometry.
        packs: the packs; each becomes one row.
        samples: the samples of all packs in order; a `Damage` stands for a sample that could not be read.
        pixels: crops of the visuals in this rank's split, in order.
        sequence_length: tokens of a row.
        divisor: see `Batch.divisor`.
        cursor: see `Batch.cursor`.
        reads: see `Batch.reads`.
        arena: where the arrays are made; None: anywhere.
    """
    arena = arena or Arena()
    shape = (len(packs), sequence_length)
    fields = {
        "input_ids": arena.full(shape, np.int64, 0),
        "labels": arena.full(shape, np.int64, 0),
        "loss_weights": arena.full(shape, np.float32, 0),
        "position_ids": arena.full(shape, np.int64, 0),
        "segment_ids": arena.full(shape, np.int32, PAD_SEGMENT),
        "is_visual": arena.full(shape, np.bool_, False),
        "dataset_ids": arena.full(shape, np.int64, 0),
    }
    opened, masked, remaining = [], [], iter(samples)
    for row, pack in enumerate(packs):
        start = 0
        for member, draw in enumerate(pack.draws):
            place = (row, slice(start, start + draw.num_tokens))
            start += draw.num_tokens
            if isinstance(sample := next(remaining), Damage):
                masked.append(sample)
                continue
            opened.append(sample)
            tokens = sample.tokens
            fields["input_ids"][place] = tokens.input_ids
            fields["labels"][place] = tokens.labels
            fields["loss_weights"][place] = tokens.weights
            fields["position_ids"][place] = tokens.position_ids
            branch = tokens.branch.astype(np.int32)  # int16 is too small for MEMBER
            fields["segment_ids"][place] = member * MEMBER + np.where(branch == 0, TRUNK, branch)
            fields["is_visual"][place] = tokens.is_visual
            fields["dataset_ids"][place] = draw.dataset
    work = WorkSizes(
        crops=sum(sum(sample.num_crops) for sample in opened),
        pairs=sum(allowed_pairs(sample.tokens) for sample in opened),
        loss_tokens=int(np.count_nonzero(fields["loss_weights"])),
    )
    arrays = fields | {"pixels": pixels} | _visual_fields(layout, opened, arena)
    return Batch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        step=packs[0].step,
        slots=tuple(pack.slot for pack in packs),
        divisor=divisor,
        cursor=cursor,
        masked=tuple(masked),
        reads=reads,
        work=work,
    )


def _visual_fields(layout: VisualLayout, samples: Sequence[OpenedSample], arena: Arena) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a batch that describe its visuals; they are empty if it has none."""
    counts = [count for sample in samples for count in sample.num_crops]
    pooling = [part for sample in samples for part in sample.pooling]
    lengths = [len(part) for part in pooling]
    width = max((part.shape[1] for part in pooling), default=layout.image_pool**2)
    flat = arena.full((sum(lengths), width), np.int64, -1)
    token = patch = 0
    for part, length, count in zip(pooling, lengths, counts, strict=True):
        place = flat[token : token + length, : part.shape[1]]
        np.add(part, patch, out=place)
        place[part < 0] = -1
        token, patch = token + length, patch + count * layout.crop_patches**2
    visual_crops, visual_tokens = (arena.full((len(counts),), np.int64, 0) for _ in range(2))
    visual_crops[:], visual_tokens[:] = counts, lengths
    return {"pooling": flat, "visual_crops": visual_crops, "visual_tokens": visual_tokens}


def make_pixels(layout: VisualLayout, count: int, arena: Arena | None = None) -> Pixels:
    """Memory for so many crops, uint8 [count, crop, crop, 3]."""
    return (arena or Arena()).full((count, layout.crop_size, layout.crop_size, 3), np.uint8, None)
