"""The vision work of a pack split among the ranks of a group: whole images and frames per rank, one all-gather.

Every rank knows from the batch how many crops and tokens each visual has, so the split needs no negotiation, and the
gathered features can be put back into the order of the batch. The vision transformer runs on every rank in every step.
A rank without a visual runs a dummy crop and multiplies by zero; otherwise the gradient hooks and collectives of the
ranks would not match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from molmo2.parallel.gather import all_gather
from molmo2.parallel.mesh import Mesh
from shards.split import Split, split_visuals

Encode = Callable[[Tensor, Tensor], Tensor]


def encode_shared(
    encode: Encode,
    pixels: Tensor,
    pooling: Tensor,
    visual_crops: Tensor,
    visual_tokens: Tensor,
    patches_per_crop: int,
    crop_size: int,
    mesh: Mesh,
) -> tuple[Tensor, Tensor]:
    """Features of all visuals of a batch; each rank of the group computes its split, and all get all features.

    Args:
        encode: (pixels uint8 [n, H, W, 3], pooling [t, P]) -> features [t, d].
        pixels: uint8 [n, H, W, 3], the crops of this rank's split, which its loader decoded.
        pooling: int64 [T, P], indices into [N * patches_per_crop], -1 pads.
        visual_crops: int64 [U], crops of each visual.
        visual_tokens: int64 [U], pooled tokens of each visual.
        patches_per_crop: patches of one crop.
        crop_size: pixels per side of a crop, for the dummy.
        mesh: this rank's place.

    Returns:
        features [T, d], and a zero (scalar) to be added to the embeddings: it keeps the vision transformer in the
        graph if no feature does.
    """
    crops = visual_crops.tolist()
    splits = split_visuals(crops, visual_tokens.tolist(), mesh.sp)
    own = splits[mesh.sp_rank]
    assert len(pixels) == len(own.crops)
    if len(own.tokens):
        features = encode(pixels, pooling if mesh.sp == 1 else _own_pooling(pooling, own, sum(crops), patches_per_crop))
    else:
        dummy = torch.zeros(1, crop_size, crop_size, 3, dtype=torch.uint8, device=pixels.device)
        features = encode(dummy, torch.zeros(1, 1, dtype=torch.int64, device=pixels.device)) * 0
    touch = features[:1].sum() * 0
    if mesh.sp_group is not None:
        block = max(1, *(len(split.tokens) for split in splits))
        features = all_gather(torch.nn.functional.pad(features, (0, 0, 0, block - len(features))), mesh)
        features = features.index_select(0, _places(splits, block).to(pixels.device))
    return features[: len(pooling)], touch


def _own_pooling(pooling: Tensor, own: Split, num_crops: int, patches_per_crop: int) -> Tensor:
    """The rows of `pooling` that belong to a split, with the patches of its crops numbered from 0."""
    number = torch.zeros(num_crops, dtype=torch.int64)  # number of each crop of the batch within the split
    number[own.crops] = torch.arange(len(own.crops))
    part = pooling[torch.from_numpy(own.tokens).to(pooling.device)]
    crop = (part // patches_per_crop).clamp(min=0)
    return torch.where(part < 0, part, number.to(pooling.device)[crop] * patches_per_crop + part % patches_per_crop)


def _places(splits: Sequence[Split], block: int) -> Tensor:
    """For each pooled token of the batch, its row among the gathered blocks of all splits; int64 [T]."""
    places = torch.empty(sum(len(split.tokens) for split in splits), dtype=torch.int64)
    for rank, split in enumerate(splits):
        places[split.tokens] = torch.arange(rank * block, rank * block + len(split.tokens))
    return places
