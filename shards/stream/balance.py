"""Balance: which rank computes which pack of a step, so that the ranks of a micro-step finish together.

Packs are equally full and not equally dear: a pack of one long video takes several times the operations of a pack of
short texts. Where every micro-step ends in a collective, all ranks wait for the dearest pack. The plan knows the sizes
of all packs before a byte is read, so the packs of a step are dealt to the ranks by cost. Dealing changes neither the
packs of a step nor their order in the plan, so it may differ between two runs over the same batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from shards.stream.plan import PackSizes, PackSpec, StepSpec


class PackCost(NamedTuple):
    """Cost of a pack in any unit, such as operations or seconds: a sum over its tokens, crops and allowed pairs.

    A row is padded to its full length, so tokens cost the same for all packs and do not matter for dealing; they do for
    the share of the time that ranks work.
    """

    token: float = 0.0
    crop: float = 0.0
    pair: float = 0.0

    def of(self, sizes: PackSizes, sequence_length: int) -> float:
        """Cost of a pack of these sizes in a row of `sequence_length` tokens."""
        return self.token * sequence_length + self.crop * sizes.crops + self.pair * sizes.pairs


SAME_COST = PackCost()  # all packs cost the same, so they are dealt in their order


def deal(costs: Sequence[float], dp_size: int, micro_batch: int = 1) -> list[list[int]]:
    """Deal the packs of a step: for each data-parallel rank the numbers of its packs, in the order of its micro-steps.

    The dearest `dp_size` packs are dealt first, one to each rank, then the next ones, so that packs of like cost meet
    in one micro-step. In every round the dearest pack goes to the rank that has the least so far, so that the sums of
    the ranks are alike too. Equal packs keep their order; the result is a pure function of the arguments.

    Args:
        costs: cost of every pack; their number is a multiple of dp_size * micro_batch.
        dp_size: number of data-parallel ranks.
        micro_batch: packs that a rank computes at once; `micro_batch` rounds are one micro-step.
    """
    assert len(costs) % (dp_size * micro_batch) == 0
    order = sorted(range(len(costs)), key=lambda number: -costs[number])  # stable
    dealt: list[list[int]] = [[] for _ in range(dp_size)]
    sums = [0.0] * dp_size
    for first in range(0, len(order), dp_size):
        ranks = sorted(range(dp_size), key=sums.__getitem__)
        for rank, number in zip(ranks, order[first : first + dp_size], strict=True):
            dealt[rank].append(number)
            sums[rank] += costs[number]
    return dealt


def own_packs(
    step: StepSpec, cost: PackCost, sequence_length: int, dp_rank: int, dp_size: int, micro_batch: int
) -> tuple[PackSpec, ...]:
    """The packs of one rank in a step, in the order of its micro-steps; other arguments: see `deal`."""
    costs = [cost.of(pack.sizes, sequence_length) for pack in step.packs]
    return tuple(step.packs[number] for number in deal(costs, dp_size, micro_batch)[dp_rank])


def working_share(costs: Iterable[Sequence[float]], dp_size: int, micro_batch: int = 1, *, dealt: bool = True) -> float:
    """Share of the time in which ranks work, where each micro-step ends when its slowest rank does; 1 is the best.

    Args:
        costs: the costs of the packs of each step.
        dp_size: number of data-parallel ranks.
        micro_batch: packs that a rank computes at once.
        dealt: whether packs are dealt by cost; else in their order.
    """
    worked = lasted = 0.0
    for step in costs:
        numbers = deal(step if dealt else [0.0] * len(step), dp_size, micro_batch)
        table = np.asarray(step)[np.array(numbers)].reshape(dp_size, -1, micro_batch).sum(axis=2)
        worked += float(table.sum())
        lasted += dp_size * float(table.max(axis=0).sum())
    return worked / lasted if lasted else 1.0
