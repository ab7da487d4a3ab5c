"""The vision work of a pack split among the ranks of a group: whole images and frames per rank, one all-gather.

The vision transformer runs on every rank in every step. A rank without a visual runs a dummy crop and multiplies by
zero; otherwise the gradient hooks and collectives of the ranks would not match.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from molmo2.parallel.gather import all_gather
from molmo2.parallel.mesh import Mesh
from molmo2.parallel.places import VisualPlaces

Encode = Callable[[Tensor, Tensor], Tensor]


def encode_shared(
    encode: Encode, pixels: Tensor, places: VisualPlaces, crop_size: int, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Features of all visuals of a batch; each rank of the group computes its split, and all get all features.

    Args:
        encode: (pixels uint8 [n, H, W, 3], pooling [t, P]) -> features [t, d].
        pixels: uint8 [n, H, W, 3], the crops of this rank's split, which its loader decoded.
        places: this rank's part.
        crop_size: pixels per side of a crop, for the dummy.
        mesh: this rank's place.

    Returns:
        features [T, d], and a zero (scalar) to be added to the embeddings: it keeps the vision transformer in the
        graph if no feature does.
    """
    assert len(pixels) == places.num_crops, "the pixels are those of another rank's split"
    if len(places.pooling):
        features = encode(pixels, places.pooling)
    else:
        dummy = torch.zeros(1, crop_size, crop_size, 3, dtype=torch.uint8, device=pixels.device)
        features = encode(dummy, torch.zeros(1, 1, dtype=torch.int64, device=pixels.device)) * 0
    touch = features[:1].sum() * 0
    if mesh.sp_group is not None:
        features = all_gather(torch.nn.functional.pad(features, (0, 0, 0, places.block - len(features))), mesh)
        features = features.index_select(0, places.gathered)
    return features[: len(places.gathered)], touch
