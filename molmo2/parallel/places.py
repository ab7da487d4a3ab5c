"""What each rank of a sequence-parallel group does with a batch, found on the host before the batch goes to its device.

Shapes must be known on the host, and a GPU that is asked for a count stops until all earlier work is done. So the
splits of the visuals and of the rows with loss are made here, from the batch in host memory, and the model gets
indices. All ranks of a group hold the same batch, so the splits need no negotiation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molmo2.parallel.mesh import Mesh
from shards.split import split_visuals
from shards.stream.collate import Batch


class VisualPlaces(NamedTuple):
    """A rank's part of the vision work of a batch, and the places of all features after the exchange.

    Attributes:
        pooling: int64 [t, P], the rows of `Batch.pooling` of the rank's split; they count within its own patches.
        gathered: int64 [T], for each pooled token of the batch its row among the gathered blocks of all ranks.
        block: rows of a rank's block.
        num_crops: crops of the rank's split.
    """

    pooling: Tensor
    gathered: Tensor
    block: int
    num_crops: int


class LossPlaces(NamedTuple):
    """The rows of hidden states that a rank sends, and the rows whose loss it computes afterwards.

    Attributes:
        sent: int64 [block], rows of the rank's slice [B * S / sp]: those with loss, then others to fill the block.
        taken: int64 [n], rows of the gathered blocks; n is 1 or more, and a rank without a row takes one of weight 0.
        labels, weights, datasets: int64, float32 and int64 [n], of the taken rows.
    """

    sent: Tensor
    taken: Tensor
    labels: Tensor
    weights: Tensor
    datasets: Tensor


class PlacedBatch(NamedTuple):
    """A batch on its device, with what a rank does with it; seeds of dropout [B, 2]; `order`: see `AttentionMask`."""

    batch: Batch
    visual: VisualPlaces
    loss: LossPlaces
    seeds: Tensor
    order: Tensor | None = None


def place_batch(
    batch: Batch, mesh: Mesh, patches_per_crop: int, device: torch.device | str = "cpu", seeds: Tensor | None = None
) -> PlacedBatch:
    """Find a rank's part of a batch in host memory, and copy both to a device without waiting for it.

    Args:
        batch: the batch in host memory; its `pixels` are the crops of this rank's split.
        mesh: this rank's place.
        patches_per_crop: patches of one crop.
        device: where the batch is computed.
        seeds: see `PlacedBatch`; without them there is no dropout.
    """

    def moved(tensor: Tensor) -> Tensor:
        pinned = tensor.pin_memory() if torch.device(device).type == "cuda" and torch.cuda.is_available() else tensor
        return pinned.to(device, non_blocking=True)

    assert batch.visual_crops.device.type == "cpu", "place a batch before it is copied to a device"
    visual = find_visual_places(batch.pooling, batch.visual_crops, batch.visual_tokens, patches_per_crop, mesh)
    loss = find_loss_places(batch.labels, batch.loss_weights, batch.dataset_ids, mesh)
    return PlacedBatch(
        batch.to(device),
        visual._replace(pooling=moved(visual.pooling), gathered=moved(visual.gathered)),
        LossPlaces(*map(moved, loss)),
        moved(torch.zeros(len(batch.slots), 2, dtype=torch.int32) if seeds is None else seeds),
    )


def find_visual_places(
    pooling: Tensor, visual_crops: Tensor, visual_tokens: Tensor, patches_per_crop: int, mesh: Mesh
) -> VisualPlaces:
    """Split the visuals of a batch in host memory over the ranks of a group; see `Batch` for the tensors."""
    crops = visual_crops.tolist()
    splits = split_visuals(crops, visual_tokens.tolist(), mesh.sp)
    own = splits[mesh.sp_rank]
    block = max(1, *(len(split.tokens) for split in splits))
    gathered = np.zeros(len(pooling), np.int64)
    for rank, split in enumerate(splits):
        gathered[split.tokens] = np.arange(rank * block, rank * block + len(split.tokens))
    number = np.zeros(max(1, sum(crops)), np.int64)  # number of each crop of the batch within the split
    number[own.crops] = np.arange(len(own.crops))
    part = pooling.numpy()[own.tokens]
    crop = np.maximum(part, 0) // patches_per_crop
    part = np.where(part < 0, part, number[crop] * patches_per_crop + part % patches_per_crop)
    return VisualPlaces(torch.from_numpy(part), torch.from_numpy(gathered), block, len(own.crops))


def find_loss_places(labels: Tensor, weights: Tensor, datasets: Tensor, mesh: Mesh) -> LossPlaces:
    """Split the rows with weight > 0 in equal parts over the ranks of a group; the tensors [B, S] are in host memory.

    In a long video the text is at the end. Without the exchange the last rank would have every row with loss, and with
    them all of the head's work and logits.
    """
    # Order the columns by the rank that holds them, [sp, B * S / sp], as the all-gather orders the rows.
    labels, weights, datasets = (
        column.unflatten(1, (mesh.sp, -1)).transpose(0, 1).flatten(1) for column in (labels, weights, datasets)
    )
    carries = weights.numpy() > 0
    counts = carries.sum(1)
    block = max(1, int(counts.max()))
    sent = np.argsort(~carries[mesh.sp_rank], kind="stable")[:block]
    rows, columns = carries.nonzero()
    size = -(-len(rows) // mesh.sp)
    part = slice(mesh.sp_rank * size, (mesh.sp_rank + 1) * size)
    within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)  # number of a row in its rank's block
    taken = (rows * block + within)[part]
    idle = not len(taken)
    places = torch.zeros(1, dtype=torch.int64) if idle else torch.from_numpy((rows * labels.shape[1] + columns)[part])
    return LossPlaces(
        sent=torch.from_numpy(sent),
        taken=places if idle else torch.from_numpy(taken),
        labels=labels.flatten()[places],
        weights=weights.flatten()[places] * (not idle),
        datasets=datasets.flatten()[places],
    )
