"""The share of the time in which ranks work, simulated on the packs of several packers; a part of bench_plan.py.

Every micro-step ends when its slowest rank does, as under ZeRO-2 and 3, and a pack lasts as long as its operations take
with the 4b model and every layer recomputed: those of its crops, its tokens (a row is padded) and its allowed pairs.
Four ways to make packs and to hand them to ranks:

    dealt        packs balanced by cost, dealt to ranks by cost: what the loader does
    best fit     packs of best-fit-decreasing over the same windows, in a random order: what it did before
    next fit     samples in the order of the stream, a pack closed at the first that does not fit
    knapsack     packs of an exact knapsack over a pool of 48, as they come
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from molmo2.model.flops import unit_costs
from molmo2.model.presets import PRESETS
from shards.stream.balance import PackCost, working_share
from shards.stream.order import key_of, shuffled
from shards.stream.packing import best_fit, pack
from shards.stream.plan import PackSizes

COST = PackCost(*unit_costs(PRESETS["4b"], level="full"))
RANKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
PACKS_PER_STEP = (128, 512, 4096)
STEPS = 2  # of the most packs
Table = tuple[list[str], dict[tuple[str, int], dict[int, float]]]
Sizes = npt.NDArray[np.float64]  # [n, 3]: tokens, crops, pairs of samples or packs


def pack_costs(members: Iterable[Sequence[int]], sizes: Sizes, sequence_length: int) -> list[float]:
    """Costs of packs of samples with these sizes."""
    sums = (sizes[list(numbers)].sum(axis=0).tolist() for numbers in members)
    return [COST.of(PackSizes(int(tokens), int(crops), pairs), sequence_length) for tokens, crops, pairs in sums]


def window_costs(windows: Sequence[Sizes], max_tokens: int, max_crops: int, *, balanced: bool) -> list[float]:
    """Costs of the packs of some windows of samples, in the order of training, packed as the plan does or as it did."""
    costs: list[float] = []
    for number, sizes in enumerate(windows):
        tokens, crops, pairs = (sizes[:, column].astype(np.int64) for column in range(3))
        packs = (
            pack(tokens, crops, pairs, max_tokens, max_crops)
            if balanced
            else best_fit(tokens, crops, max_tokens, max_crops)
        )
        order = shuffled(len(packs), key_of("packs", 0, number)).tolist()
        costs += pack_costs([packs[i] for i in order], sizes, max_tokens)
    return costs


def shares(costs: Sequence[float], packs_per_step: int, *, dealt: bool) -> dict[int, float]:
    """The share of working time by number of data-parallel ranks; empty where there are too few packs for a step."""
    count = len(costs) // packs_per_step
    steps = [costs[i * packs_per_step : (i + 1) * packs_per_step] for i in range(count)]
    return {dp: working_share(steps, dp, dealt=dealt) for dp in RANKS if steps and packs_per_step % dp == 0}


def table(by_way: dict[str, list[float]]) -> Table:
    """Lines to print, and the shares by way and packs per step. The costs are those of each way's packs in order."""
    found = {
        (way, count): shares(costs, count, dealt=way == "dealt")
        for way, costs in by_way.items()
        for count in PACKS_PER_STEP
    }
    lines = [f"{'packs a step':>14} {'':10s}" + "".join(f"{f'dp {dp}':>9}" for dp in RANKS)]
    for count in PACKS_PER_STEP:
        for way in by_way:
            row = found[way, count]
            cells = "".join(f"{row[dp]:>9.3f}" if dp in row else f"{'-':>9}" for dp in RANKS)
            lines += [f"{count:>14,} {way:10s}{cells}"] if row else []
    return lines, found
