"""Splitting the vision work of a pack over the ranks of its sequence-parallel group, balanced by number of crops.

A visual (an image or a frame) is never divided: its pooling needs all its patches. A rank's loader decodes the visuals
of its split, and its model encodes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """One rank's contiguous part of a batch's visuals, as slices of visuals, their crops and pooled tokens."""

    visuals: slice
    crops: slice
    tokens: slice

    @property
    def num_tokens(self) -> int:
        """Number of pooled tokens of the split."""
        return int(self.tokens.stop - self.tokens.start)


def split_visuals(crops: Sequence[int], tokens: Sequence[int], ranks: int) -> list[Split]:
    """Split the visuals into one contiguous run per rank, balanced by crops.

    All crops in a row are divided into `ranks` equal parts; a visual goes to the part that holds its middle.

    Args:
        crops: number of crops of each visual.
        tokens: number of pooled tokens of each visual.
        ranks: number of splits. If every visual has one crop, the splits differ by at most one visual.
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
        Split(*(slice(*ends) for ends in zip(first, last, strict=True))) for first, last in itertools.pairwise(edges)
    ]
