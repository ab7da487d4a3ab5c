"""Vision work shared by the ranks that share a pack: whole images and frames per rank, one exchange of features.

Every rank knows from the batch how many crops and tokens each visual has, so nothing is negotiated. The tower runs
on every rank in every step, on a dummy crop times zero where there is no visual: otherwise the gradient hooks and
collectives of the ranks would not match.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molmo2.parallel.gather import all_gather
from molmo2.parallel.mesh import Mesh
from shards.split import split_visuals

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
    """Features of all visuals of a batch, each rank of the group having computed its share.

    Args:
        encode: (pixels uint8 [n, H, W, 3], pooling [t, P]) -> features [t, d].
        pixels: uint8 [n, H, W, 3], the crops of this rank's share: what its loader decoded.
        pooling: int64 [T, P], indices into [N * patches_per_crop], -1 pads.
        visual_crops: int64 [U], crops of each visual.
        visual_tokens: int64 [U], pooled tokens of each visual.
        patches_per_crop: patches of one crop.
        crop_size: pixels per side of a crop, for the dummy.
        mesh: this rank's place.

    Returns:
        features [T, d], and a zero (scalar) to be added to the embeddings: it ties the tower to the graph where
        no feature does.
    """
    shares = split_visuals(visual_crops.tolist(), visual_tokens.tolist(), mesh.sp)
    own = shares[mesh.sp_rank]
    assert len(pixels) == own.crops.stop - own.crops.start
    if own.num_tokens:
        part = pooling[own.tokens]
        part = torch.where(part < 0, part, part - own.crops.start * patches_per_crop)
        features = encode(pixels, part)
    else:
        dummy = torch.zeros(1, crop_size, crop_size, 3, dtype=torch.uint8, device=pixels.device)
        features = encode(dummy, torch.zeros(1, 1, dtype=torch.int64, device=pixels.device)) * 0
    touch = features[:1].sum() * 0
    if mesh.sp_group is not None:
        block = max(1, *(share.num_tokens for share in shares))
        features = all_gather(torch.nn.functional.pad(features, (0, 0, 0, block - len(features))), mesh)
        index = [rank * block + i for rank, share in enumerate(shares) for i in range(share.num_tokens)]
        features = features[torch.tensor(index, dtype=torch.int64, device=pixels.device)]
    return features[: len(pooling)], touch
