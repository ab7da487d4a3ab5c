"""Splitting the vision work of a pack over the ranks of its sequence-parallel group, balanced by number of crops.

A visual (an image or a frame) is never divided: its pooling needs all its patches. A rank's loader decodes the visuals
of its split, and its model encodes them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """One rank's part of a batch's visuals: the numbers of its visuals, of their crops and of their pooled tokens.

    All three are int64 in ascending order, and count within the batch.
    """

    visuals: Numbers
    crops: Numbers
    tokens: Numbers


def split_visuals(crops: Sequence[int], tokens: Sequence[int], ranks: int) -> list[Split]:
    """Split the visuals over ranks: in order of decreasing size, each goes to the rank that has the fewest crops.

    The crops of two ranks differ by no more than one visual has: the last visual of the fullest rank went there when
    no other rank had fewer. The fullest rank is within 4/3 of the best possible split (Graham's bound for this order).

    Args:
        crops: number of crops of each visual.
        tokens: number of pooled tokens of each visual.
        ranks: number of splits.
    """
    assert len(crops) == len(tokens)
    loads = [(0, rank) for rank in range(ranks)]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for visual in sorted(range(len(crops)), key=lambda number: -crops[number]):
        load, rank = loads[0]
        owned[rank].append(visual)
        heapq.heapreplace(loads, (load + crops[visual], rank))
    crop_ends, token_ends = np.cumsum(crops, dtype=np.int64), np.cumsum(tokens, dtype=np.int64)

    def members(ends: Numbers, sizes: Sequence[int], visuals: Iterable[int]) -> Numbers:
        ranges = [np.arange(ends[visual] - sizes[visual], ends[visual]) for visual in visuals]
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    return [
        Split(
            visuals=np.array(visuals, np.int64),
            crops=members(crop_ends, crops, visuals),
            tokens=members(token_ends, tokens, visuals),
        )
        for visuals in map(sorted, owned)
    ]
