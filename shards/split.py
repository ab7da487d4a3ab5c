"""Vision work of a pack cut into parts for the ranks that share it: whole images and frames, balanced by crops.

A visual is never cut, since its pooling mixes its own patches only. The loader decodes a part, the model encodes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch: runs of visuals, of their crops, and of the pooled tokens that they give."""

    visuals: slice
    crops: slice
    tokens: slice

    @property
    def num_tokens(self) -> int:
        """Pooled tokens of the part."""
        return int(self.tokens.stop - self.tokens.start)


def split_visuals(crops: Sequence[int], tokens: Sequence[int], ranks: int) -> list[Share]:
    """Contiguous shares of the visuals, balanced by crops, one a rank; a visual lies where its middle falls.

    Args:
        crops: number of crops of each visual.
        tokens: number of pooled tokens of each visual.
        ranks: number of shares. With one crop a visual, shares differ by one at most.
    """
    total = sum(crops)
    edges = [(0, 0, 0)] * ranks + [(len(crops), total, sum(tokens))]
    crop = token = owner = 0
    for visual, (num_crops, num_tokens) in enumerate(zip(crops, tokens, strict=True)):
        middle = (2 * crop + num_crops) * ranks // max(1, 2 * total)
        for rank in range(owner + 1, middle + 1):
            edges[rank] = (visual, crop, token)
        owner = max(owner, middle)
        crop, token = crop + num_crops, token + num_tokens
    for rank in range(owner + 1, ranks):
        edges[rank] = (len(crops), crop, token)
    return [
        Share(*(slice(*ends) for ends in zip(first, last, strict=True))) for first, last in itertools.pairwise(edges)
    ]
