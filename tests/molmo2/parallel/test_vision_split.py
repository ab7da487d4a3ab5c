"""Visuals shared by ranks: whole images and frames, balanced, with the features and gradients of one rank."""

import itertools

import numpy as np
import parallel_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.places import find_visual_places
from molmo2.parallel.vision import encode_shared
from shards.split import split_visuals

VISUALS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 50)), max_size=40)


@given(visuals=VISUALS, ranks=st.integers(1, 9))
def test_each_visual_is_in_one_split_with_its_crops_and_tokens(visuals: list[tuple[int, int]], ranks: int) -> None:
    crops, tokens = [v[0] for v in visuals], [v[1] for v in visuals]
    splits = split_visuals(crops, tokens, ranks)
    assert len(splits) == ranks
    assert sorted(np.concatenate([split.visuals for split in splits])) == list(range(len(visuals)))
    for split in splits:
        owned = set(split.visuals.tolist())
        for sizes, numbers in ((crops, split.crops), (tokens, split.tokens)):
            owners = [visual for visual, size in enumerate(sizes) for _ in range(size)]
            assert numbers.tolist() == [number for number, owner in enumerate(owners) if owner in owned]


@given(visuals=VISUALS, ranks=st.integers(1, 9))
def test_splits_differ_by_no_more_crops_than_one_visual_has(visuals: list[tuple[int, int]], ranks: int) -> None:
    crops = [v[0] for v in visuals]
    counts = [len(split.crops) for split in split_visuals(crops, [v[1] for v in visuals], ranks)]
    assert max(counts) - min(counts) <= max(crops, default=0)


@given(crops=st.lists(st.integers(1, 13), max_size=6), ranks=st.integers(1, 3))
def test_the_fullest_split_is_within_a_third_of_the_best(crops: list[int], ranks: int) -> None:
    def fullest(owners: tuple[int, ...]) -> int:
        return max(sum(c for c, owner in zip(crops, owners, strict=True) if owner == rank) for rank in range(ranks))

    best = min(map(fullest, itertools.product(range(ranks), repeat=len(crops))))
    assert max(len(split.crops) for split in split_visuals(crops, crops, ranks)) * 3 <= best * 4


@pytest.mark.parametrize(
    ("crops", "counts"), [([6, 10, 10, 7], [10, 10, 13]), ([5, 9, 2, 9, 1, 9, 1, 5], [11, 10, 10, 10])]
)
def test_large_images_beside_each_other_are_parted(crops: list[int], counts: list[int]) -> None:
    assert [len(split.crops) for split in split_visuals(crops, crops, len(counts))] == counts


@pytest.mark.parametrize(("frames", "ranks"), [(384, 8), (5, 2), (3, 8), (1, 2), (7, 3), (0, 4)])
def test_frames_differ_by_one_at_most(frames: int, ranks: int) -> None:
    counts = [len(split.crops) for split in split_visuals([1] * frames, [81] * frames, ranks)]
    assert sum(counts) == frames
    assert max(counts) - min(counts) <= 1


CASES = [
    ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2]),
    ([5, 1], [9, 3]),
    ([2], [4]),
    ([], []),
    ([3, 1, 1, 2], [1, 7, 2, 3]),
    ([1, 4, 2, 4, 3], [2, 1, 4, 3, 2]),
]


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
    places = find_visual_places(pooling, none, none, 4, SINGLE)
    features, touch = encode_shared(parallel_cases.encoder(projection), pixels, places, 4, SINGLE)
    assert features.shape == (0, 5)
    touch.backward()
    assert projection.grad is not None
    assert not projection.grad.any()
