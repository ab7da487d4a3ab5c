"""Packing samples into sequences under two limits (tokens and crops), from their lengths alone.

The algorithm is best-fit-decreasing: the longest sample first, each into the fullest pack that still has room. The
fullness of a pack is measured by the limit that is scarcer over all samples; the other limit only has to hold. Ties are
broken by position, so the result is a pure function of the arguments.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def pack(tokens: Ints, crops: Ints, max_tokens: int, max_crops: int) -> list[list[int]]:
    """Pack samples: the positions of the samples of every pack. `tokens` and `crops`: [n], none above its limit.

    Worked example: limits 10 tokens and 4 crops, samples (7, 1), (3, 0), (6, 4), (3, 1). All need 19 of 10 tokens, but
    6 of 4 crops, so tokens run out first. (7, 1) opens pack A and leaves (3, 3); (6, 4) opens B and leaves (4, 0);
    (3, 1) comes before (3, 0), being larger, and goes to A, the fullest; (3, 0) goes to B.
    """
    assert len(tokens) == 0 or (tokens.max() <= max_tokens and crops.max() <= max_crops)
    order = np.lexsort((-crops, -tokens))  # stable: equal samples keep their order
    needs, limits = (tokens, crops), (max_tokens, max_crops)
    if int(crops.sum()) * max_tokens > int(tokens.sum()) * max_crops:
        needs, limits = (crops, tokens), (max_crops, max_tokens)
    packs: list[list[int]] = []
    free: list[tuple[int, int, int]] = []  # sorted: room left under the first limit, under the second, pack number
    for sample, first, second in zip(order.tolist(), needs[0][order].tolist(), needs[1][order].tolist(), strict=True):
        place = bisect_left(free, (first, second, -1))
        while place < len(free) and free[place][1] < second:
            place += 1
        if place < len(free):
            first_left, second_left, number = free.pop(place)
        else:
            first_left, second_left, number = (*limits, len(packs))
            packs.append([])
        packs[number].append(sample)
        insort(free, (first_left - first, second_left - second, number))
    return packs
