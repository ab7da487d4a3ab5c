"""Dealing the packs of a step to ranks by cost: a partition, with equals beside equals, that changes no step."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import write_lengths

from shards.stream.balance import SAME_COST, PackCost, deal, own_packs, working_share
from shards.stream.loader import PlanSampler
from shards.stream.mixture import MixtureSpec
from shards.stream.packing import best_fit
from shards.stream.plan import Cursor, PackSizes, Plan, PlanSettings, open_plan

SETTINGS = PlanSettings(sequence_length=512, max_crops=24, packs_per_step=16, window=256)
BY_CROPS = PackCost(token=0.5, crop=100.0, pair=0.01)
SIZE = 4  # packs of a step where steps of one window are compared
SHAPES = [(dp, micro) for dp in (1, 2, 4, 8, 16) for micro in (1, 2, 4) if 16 % (dp * micro) == 0]

sixteen_costs = st.lists(st.floats(0, 1000), min_size=16, max_size=16)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rng = np.random.default_rng(0)
    tokens, crops = rng.integers(20, 500, (300, 2)), rng.integers(0, 24, (300, 2))
    dataset = write_lengths(tmp_path, "d", tokens, crops, num_shards=3)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"d": None}}}})
    return Plan([dataset], mixture, SETTINGS)


@given(costs=sixteen_costs, shape=st.sampled_from(SHAPES))
def test_every_pack_is_dealt_once_and_dear_packs_meet_dear_ones(costs: list[float], shape: tuple[int, int]) -> None:
    dp, micro = shape
    dealt = deal(costs, dp, micro)
    assert sorted(itertools.chain(*dealt)) == list(range(16))
    assert {len(own) for own in dealt} == {16 // dp}
    rounds = [[costs[own[i]] for own in dealt] for i in range(16 // dp)]
    assert all(min(one) >= max(later) for one, later in itertools.pairwise(rounds))
    sums = [sum(costs[number] for number in own) for own in dealt]
    assert max(sums) - min(sums) <= max(costs) - min(costs) + 1e-6  # each round makes up for the one before
    assert deal(list(costs), dp, micro) == dealt


@given(costs=sixteen_costs, seed=st.integers(0, 2**32 - 1))
def test_no_other_dealing_keeps_the_ranks_busier(costs: list[float], seed: int) -> None:
    """For one pack at a time the sorted order is the best: any other has micro-steps that last as long or longer."""
    other = np.random.default_rng(seed).permutation(costs).tolist()
    for dp in (2, 4, 8):
        assert working_share([costs], dp) >= working_share([other], dp, dealt=False) - 1e-9


def test_packs_of_equal_cost_are_dealt_in_their_order() -> None:
    assert deal([1.0] * 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert deal([0.0] * 8, 2, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_share_of_working_time_by_hand() -> None:
    costs = [4.0, 1.0, 4.0, 1.0]
    assert working_share([costs], 2, dealt=False) == 10 / (2 * (4 + 4))
    assert working_share([costs], 2) == 1.0
    assert working_share([costs], 4) == 10 / 16
    assert working_share([costs], 2, 2) == 1.0  # 4 + 1 on each rank
    assert working_share([[0.0, 0.0]], 2) == 1.0
    assert BY_CROPS.of(PackSizes(tokens=7, crops=3, pairs=50.0), 10) == 5 + 300 + 0.5


def test_sizes_of_a_pack_are_sums_over_its_samples(plan: Plan) -> None:
    for pack in plan.step(Cursor()).packs:
        tokens = [draw.num_tokens for draw in pack.draws]
        pairs = sum(count * (count + 1) / 2 for count in tokens)
        assert pack.sizes == (sum(tokens), sum(draw.num_crops for draw in pack.draws), pairs)


@pytest.mark.parametrize(("dp", "micro"), SHAPES)
def test_dealing_changes_neither_the_packs_of_a_step_nor_its_divisor(plan: Plan, dp: int, micro: int) -> None:
    step = plan.step(Cursor())
    count = 16 // dp // micro
    for cost in (SAME_COST, BY_CROPS):
        samplers = [PlanSampler(plan, Cursor(), rank, dp, micro, cost=cost) for rank in range(dp)]
        ranks = [list(itertools.islice(sampler, count)) for sampler in samplers]
        assert {(spec.divisor, spec.cursor) for specs in ranks for spec in specs} == {(step.divisor, step.cursor)}
        packs = [pack for specs in ranks for spec in specs for pack in spec.packs]
        assert tuple(sorted(packs, key=lambda pack: pack.slot)) == step.packs
        assert packs[: 16 // dp] == list(own_packs(step, cost, 512, 0, dp, micro))


def videos_in_packs(folder: Path, windows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Videos in the first and in the last step of each window, and the standard deviation over all steps.

    One draw of twelve is a video, of up to half a pack.
    """
    rng = np.random.default_rng(1)
    for name, (tokens, crops) in {"videos": ((1500, 4000), (40, 90)), "short": ((50, 400), (0, 12))}.items():
        write_lengths(folder, name, rng.integers(*tokens, (500, 1)), rng.integers(*crops, (500, 1)))
    groups = {"v": {"rate": 1, "datasets": {"videos": None}}, "s": {"rate": 11, "datasets": {"short": None}}}
    settings = PlanSettings(sequence_length=9000, max_crops=180, packs_per_step=SIZE, window=400)
    plan = open_plan([str(folder)], MixtureSpec.model_validate({"groups": groups}), settings)
    number = [dataset.name for dataset in plan.datasets].index("videos")
    counts = []
    for window in range(windows):
        packs = [sum(draw.dataset == number for draw in draws) for draws in plan._window(window)]
        counts.append([sum(packs[i : i + SIZE]) for i in range(0, len(packs) - SIZE + 1, SIZE)])
    first, last = (np.array([steps[i] for steps in counts]) for i in (0, -1))
    return first, last, float(np.std([count for steps in counts for count in steps]))


@pytest.mark.slow
def test_balanced_packs_leave_the_expected_composition_of_a_step_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place in a window has as many videos, on average, as another; steps differ less than with best fit alone."""
    first, last, spread = videos_in_packs(tmp_path / "balanced", 200)
    monkeypatch.setattr("shards.stream.plan.pack", lambda tokens, crops, pairs, *most: best_fit(tokens, crops, *most))
    plain, _, plain_spread = videos_in_packs(tmp_path / "plain", 200)
    error = np.sqrt((first.var() + last.var() + plain.var()) / 200)
    assert abs(first.mean() - last.mean()) < 3 * error
    assert abs(first.mean() - plain.mean()) < 3 * error
    assert spread < 0.5 * plain_spread
