"""How well the ranks of a run would share its work, computed from the sizes of the packs of its first steps.

It assumes that every micro-step ends when its slowest rank does, as under ZeRO-2 and 3, and that a pack's time is its
cost. Under ZeRO-0 and 1 ranks meet once a step, and work for a larger share of the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from molmo2.config import Recipe
from molmo2.model.presets import PRESETS
from molmo2.training.cost import pack_cost
from shards.stream.balance import working_share
from shards.stream.plan import PackSizes

GOOD = 0.9  # share of working time below which the lines name settings to change
FACTORS = (2, 4, 8)  # by which sp and packs_per_step are raised to see what that gives
Costs = Sequence[Sequence[float]]  # of the packs of each step


def balance_lines(recipe: Recipe, steps: Sequence[Sequence[PackSizes]], worlds: Sequence[int]) -> list[str]:
    """Lines to print: the share of the time in which ranks work, for each number of ranks, and what to change.

    Args:
        recipe: the run; its model is a preset.
        steps: the sizes of the packs of each step.
        worlds: numbers of ranks; one that does not divide the packs of a step is left out.
    """
    cost, length = pack_cost(recipe, PRESETS[recipe.model]), recipe.data.sequence_length
    costs = [[cost.of(sizes, length) for sizes in step] for step in steps]
    flat = np.array([value for step in costs for value in step])
    lines = [
        f"the dearest pack costs {flat.max() / flat.mean():.2f} times the mean; share of the time in which ranks work,",
        "if every micro-step ends with its slowest rank (ZeRO-2 and 3):",
        f"{'ranks':>7} {'dp':>6} {'micro-steps':>12} {'working':>8} {'packs not dealt by cost':>24}",
    ]
    share = 1.0
    for world in worlds:
        if (dp := _groups(recipe, world, recipe.train.sp, recipe.train.packs_per_step)) is None:
            continue
        micro, count = recipe.train.micro_batch, recipe.train.packs_per_step
        share, undealt = working_share(costs, dp, micro), working_share(costs, dp, micro, dealt=False)
        lines.append(f"{world:>7} {dp:>6} {count // dp // micro:>12} {share:>8.1%} {undealt:>24.1%}")
        last = world
    if len(lines) == 3:
        return [*lines[:2], f"  none of {', '.join(map(str, worlds))} ranks divides the packs of a step"]
    if share < GOOD:
        lines += [f"what would change that for {last} ranks:", *_changes(recipe, costs, last)]
    return lines


def _changes(recipe: Recipe, costs: Costs, world: int) -> Iterator[str]:
    """One line per setting that can be raised, with the share that it gives."""
    train = recipe.train
    for factor in FACTORS:
        starts = range(0, len(costs) - factor + 1, factor)
        merged = [list(itertools.chain(*costs[start : start + factor])) for start in starts]
        if merged and (dp := _groups(recipe, world, train.sp, train.packs_per_step * factor)) is not None:
            share = working_share(merged, dp, train.micro_batch)
            yield f"  train.packs_per_step={train.packs_per_step * factor}: {share:.1%}"
    for factor in FACTORS:
        if (dp := _groups(recipe, world, train.sp * factor, train.packs_per_step)) is not None:
            share = working_share(costs, dp, train.micro_batch)
            yield f"  train.sp={train.sp * factor}: {share:.1%}"


def _groups(recipe: Recipe, world: int, sp: int, packs_per_step: int) -> int | None:
    """The number of data-parallel groups; None if packs, heads or tokens cannot be divided."""
    heads, length = PRESETS[recipe.model].text.num_heads, recipe.data.sequence_length
    dp = world // sp
    fits = world % sp == 0 and heads % sp == 0 and length % sp == 0 and dp > 0
    return dp if fits and packs_per_step % (dp * recipe.train.micro_batch) == 0 else None
