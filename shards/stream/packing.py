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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# Allowed pairs that cost as much as one crop with the released 4b and 8b models. It is no setting: which samples share
# a pack may not depend on the model.
PAIRS_PER_CROP = 10**6
SPREAD = 90  # percent of the cost that is spread; the rest, in many cheap samples, fills the packs
TRIES = 8  # packs that a dear sample is tried in before it is left to best fit
BITS = 24  # of a number of tokens or crops, or of a pack: three of them are kept in one integer
LOW = (1 << BITS) - 1
MIDDLE = LOW << BITS  # masks the room in the other limit, see `_room`


@dataclass(frozen=True, slots=True)
class _Samples:
    """What the samples need of the scarcer limit (`first`) and of the other one, and the order from long to short."""

    first: list[int]
    second: list[int]
    limits: tuple[int, int]
    by_length: Ints


def pack(tokens: Ints, crops: Ints, pairs: Ints, max_tokens: int, max_crops: int) -> list[list[int]]:
    """Pack samples: the positions of the samples of every pack.

    Args:
        tokens: [n] tokens of each sample, none above its limit.
        crops: [n] crops, none above its limit.
        pairs: [n] pairs of tokens that attend to each other.
        max_tokens: limit of a pack.
        max_crops: limit of a pack.
    """
    samples = _samples(tokens, crops, max_tokens, max_crops)
    fewest = _fill(samples, samples.by_length, [], [])
    costs = crops * PAIRS_PER_CROP + pairs  # integers, whose sums are the same on every machine
    balanced = _spread(samples, costs, len(fewest))
    return balanced if len(balanced) <= len(fewest) else fewest


def best_fit(tokens: Ints, crops: Ints, max_tokens: int, max_crops: int) -> list[list[int]]:
    """Pack samples by best-fit-decreasing alone; arguments and result as in `pack`."""
    samples = _samples(tokens, crops, max_tokens, max_crops)
    return _fill(samples, samples.by_length, [], [])


def _samples(tokens: Ints, crops: Ints, max_tokens: int, max_crops: int) -> _Samples:
    assert len(tokens) == 0 or (tokens.max() <= max_tokens and crops.max() <= max_crops)
    assert max(max_tokens, max_crops, len(tokens)) < LOW
    by_length = np.lexsort((-crops, -tokens))  # stable: equal samples keep their order
    if int(crops.sum()) * max_tokens > int(tokens.sum()) * max_crops:
        return _Samples(crops.tolist(), tokens.tolist(), (max_crops, max_tokens), by_length)
    return _Samples(tokens.tolist(), crops.tolist(), (max_tokens, max_crops), by_length)


def _room(first: int, second: int, number: int) -> int:
    """The room left in a pack as one integer: its order is that of (first, second, number), and it costs no tuple."""
    return (first << 2 * BITS) | (second << BITS) | number


def _fill(samples: _Samples, numbers: Ints, packs: list[list[int]], free: list[int]) -> list[list[int]]:
    """Put samples, each into the fullest pack that has room or into a new one; `free`: the sorted room in `packs`."""
    for sample in numbers.tolist():
        first, second = samples.first[sample], samples.second[sample]
        needed = _room(first, second, 0)
        place, second, end = bisect_left(free, needed), second << BITS, len(free)
        while place < end and free[place] & MIDDLE < second:
            place += 1
        if place < end:
            left = free.pop(place)
        else:
            left = _room(*samples.limits, len(packs))
            packs.append([])
        packs[left & LOW].append(sample)
        insort(free, left - needed)
    return packs


def _spread(samples: _Samples, costs: Ints, count: int) -> list[list[int]]:
    """Pack samples into `count` packs of like cost, or into more if the cheap samples do not fit any more."""
    by_cost = np.argsort(-costs, kind="stable")
    dear = by_cost[: 1 + int(np.searchsorted(np.cumsum(costs[by_cost]), int(costs.sum()) * SPREAD // 100))]
    first_left, second_left = ([limit] * count for limit in samples.limits)
    packs: list[list[int]] = [[] for _ in range(count)]
    cheapest = list(range(count))  # a heap of cost << BITS | number
    placed = np.zeros(len(costs), np.bool_)
    for sample, cost in zip(dear.tolist(), costs[dear].tolist(), strict=True):
        first, second = samples.first[sample], samples.second[sample]
        tried: list[int] = []
        while cheapest and len(tried) < TRIES:
            item = heapq.heappop(cheapest)
            number = item & LOW
            if first_left[number] >= first and second_left[number] >= second:
                first_left[number] -= first
                second_left[number] -= second
                placed[sample] = True
                packs[number].append(sample)
                tried.append(item + (cost << BITS))
                break
            tried.append(item)
        for item in tried:
            heapq.heappush(cheapest, item)
    free = sorted(map(_room, first_left, second_left, range(count)))
    rest = samples.by_length[~placed[samples.by_length]]
    return [members for members in _fill(samples, rest, packs, free) if members]
