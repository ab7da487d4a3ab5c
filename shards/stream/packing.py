"""Packing samples into sequences under two limits (tokens and crops), from their lengths alone.

First best-fit-decreasing finds how many packs a window needs: the longest sample first, each into the fullest pack that
still has room. Then the samples are packed once more into so many packs, now with the cost of packs in mind, since
packs of like cost keep ranks from waiting for each other (`shards.stream.balance`): the dear samples are spread, each
into the cheapest pack with room, and the cheap ones fill what is left by best fit. If that needs more packs, the first
result stands, so that balance never costs fill. One sample that fills a pack is beyond any packer.

The fullness of a pack is measured by the limit that is scarcer over all samples; the other limit only has to hold. Ties
are broken by position, so the result is a pure function of the arguments.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# Allowed pairs that cost as much as one crop with the released 4b and 8b models. It is no setting: which samples share
# a pack may not depend on the model.
PAIRS_PER_CROP = 10**6
SPREAD = 90  # percent of the cost that is spread; the rest, in many cheap samples, fills the packs
TRIES = 8  # packs that a dear sample is tried in before it is left to best fit


@dataclass(slots=True)
class _Packs:
    """Packs under way, and the room in each, sorted: under the scarcer limit, under the other, pack number."""

    limits: tuple[int, int]
    packs: list[list[int]] = field(default_factory=list)
    free: list[tuple[int, int, int]] = field(default_factory=list)

    def best_fit(self, samples: list[int], needs: list[tuple[int, int]]) -> None:
        """Put each sample into the fullest pack that has room, or into a new one."""
        free, packs = self.free, self.packs
        for sample in samples:
            first, second = needs[sample]
            place = bisect_left(free, (first, second, -1))
            while place < len(free) and free[place][1] < second:
                place += 1
            if place < len(free):
                first_left, second_left, number = free.pop(place)
            else:
                first_left, second_left, number = (*self.limits, len(packs))
                packs.append([])
            packs[number].append(sample)
            insort(free, (first_left - first, second_left - second, number))


def pack(tokens: Ints, crops: Ints, pairs: Ints, max_tokens: int, max_crops: int) -> list[list[int]]:
    """Pack samples: the positions of the samples of every pack.

    Args:
        tokens: [n] tokens of each sample, none above its limit.
        crops: [n] crops, none above its limit.
        pairs: [n] pairs of tokens that attend to each other.
        max_tokens: limit of a pack.
        max_crops: limit of a pack.
    """
    needs, limits = _by_scarcity(tokens, crops, max_tokens, max_crops)
    fewest = best_fit(tokens, crops, max_tokens, max_crops)
    costs = crops * PAIRS_PER_CROP + pairs  # integers, whose sums are the same on every machine
    balanced = _spread(needs, costs, _by_length(tokens, crops), limits, len(fewest))
    return balanced if len(balanced) <= len(fewest) else fewest


def best_fit(tokens: Ints, crops: Ints, max_tokens: int, max_crops: int) -> list[list[int]]:
    """Pack samples by best-fit-decreasing alone; arguments and result as in `pack`."""
    needs, limits = _by_scarcity(tokens, crops, max_tokens, max_crops)
    packs = _Packs(limits)
    packs.best_fit(_by_length(tokens, crops).tolist(), needs)
    return packs.packs


def _by_length(tokens: Ints, crops: Ints) -> Ints:
    return np.lexsort((-crops, -tokens))  # stable: equal samples keep their order


def _by_scarcity(
    tokens: Ints, crops: Ints, max_tokens: int, max_crops: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """What each sample needs of the scarcer limit and of the other one, and the limits in that order."""
    assert len(tokens) == 0 or (tokens.max() <= max_tokens and crops.max() <= max_crops)
    if int(crops.sum()) * max_tokens > int(tokens.sum()) * max_crops:
        return list(zip(crops.tolist(), tokens.tolist(), strict=True)), (max_crops, max_tokens)
    return list(zip(tokens.tolist(), crops.tolist(), strict=True)), (max_tokens, max_crops)


def _spread(
    needs: list[tuple[int, int]], costs: Ints, by_length: Ints, limits: tuple[int, int], count: int
) -> list[list[int]]:
    """Pack samples into `count` packs of like cost, or into more if the cheap samples do not fit any more."""
    by_cost = np.argsort(-costs, kind="stable")
    dear = by_cost[: 1 + int(np.searchsorted(np.cumsum(costs[by_cost]), int(costs.sum()) * SPREAD // 100))]
    room = [limits] * count
    packs: list[list[int]] = [[] for _ in range(count)]
    cheapest = [(0, number) for number in range(count)]  # a heap
    placed = np.zeros(len(needs), np.bool_)
    for sample, cost in zip(dear.tolist(), costs[dear].tolist(), strict=True):
        first, second = needs[sample]
        tried: list[tuple[int, int]] = []
        while cheapest and len(tried) < TRIES:
            total, number = heapq.heappop(cheapest)
            left = (room[number][0] - first, room[number][1] - second)
            if min(left) >= 0:
                room[number], placed[sample] = left, True
                packs[number].append(sample)
                tried.append((total + cost, number))
                break
            tried.append((total, number))
        for item in tried:
            heapq.heappush(cheapest, item)
    rest = _Packs(limits, packs, sorted((*left, number) for number, left in enumerate(room)))
    rest.best_fit(by_length[~placed[by_length]].tolist(), needs)
    return [members for members in rest.packs if members]
