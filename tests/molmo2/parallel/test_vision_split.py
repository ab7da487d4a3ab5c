"""Visuals shared by ranks: whole images and frames, balanced, with the features and gradients of one rank."""

import itertools

import parallel_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.vision import encode_shared
from shards.split import split_visuals


@given(visuals=st.lists(st.tuples(st.integers(1, 13), st.integers(1, 50)), max_size=40), ranks=st.integers(1, 9))
def test_shares_are_whole_visuals_in_order(visuals: list[tuple[int, int]], ranks: int) -> None:
    crops, tokens = [v[0] for v in visuals], [v[1] for v in visuals]
    shares = split_visuals(crops, tokens, ranks)
    bounds = {(i, sum(crops[:i]), sum(tokens[:i])) for i in range(len(crops) + 1)}
    assert len(shares) == ranks
    assert {(share.visuals.start, share.crops.start, share.tokens.start) for share in shares} <= bounds
    assert (shares[0].visuals.start, shares[-1].visuals.stop) == (0, len(crops))
    assert (shares[0].crops.start, shares[-1].crops.stop) == (0, sum(crops))
    assert (shares[0].tokens.start, shares[-1].tokens.stop) == (0, sum(tokens))
    for left, right in itertools.pairwise(shares):
        assert (left.visuals.stop, left.crops.stop) == (right.visuals.start, right.crops.start)
        assert left.tokens.stop == right.tokens.start
    largest = max((share.crops.stop - share.crops.start for share in shares), default=0)
    assert largest <= sum(crops) / ranks + max(crops, default=0)


@pytest.mark.parametrize(("frames", "ranks"), [(384, 8), (5, 2), (3, 8), (1, 2), (7, 3), (0, 4)])
def test_frames_differ_by_one_at_most(frames: int, ranks: int) -> None:
    shares = split_visuals([1] * frames, [81] * frames, ranks)
    counts = [share.crops.stop - share.crops.start for share in shares]
    assert sum(counts) == frames
    assert max(counts) - min(counts) <= 1


CASES = [([1, 1, 1, 1, 1], [2, 2, 2, 2, 2]), ([5, 1], [9, 3]), ([2], [4]), ([], []), ([3, 1, 1, 2], [1, 7, 2, 3])]


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_split_vision_equals_whole(world: int) -> None:
    ranks = run_ranks(world, parallel_cases.vision, CASES)
    for case, (crops, tokens) in enumerate(CASES):
        projection = torch.linspace(-1, 1, 12 * 5).reshape(12, 5).requires_grad_()
        pixels, pooling, weight = parallel_cases.vision_inputs(crops, tokens)
        features = parallel_cases.encoder(projection)(pixels, pooling)
        (features * weight).sum().backward()
        for rank in ranks:
            torch.testing.assert_close(rank[case][0], features.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank[case][1], projection.grad, rtol=1e-5, atol=1e-5)


def test_one_rank_without_a_visual_still_runs_the_tower() -> None:
    projection = torch.ones(12, 5, requires_grad=True)
    pixels, pooling, _ = parallel_cases.vision_inputs([], [])
    none = torch.zeros(0, dtype=torch.int64)
    features, touch = encode_shared(parallel_cases.encoder(projection), pixels, pooling, none, none, 4, 4, SINGLE)
    assert features.shape == (0, 5)
    touch.backward()
    assert projection.grad is not None
    assert not projection.grad.any()
