"""Packing: nothing lost, nothing over a limit, little room left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.packing import pack

Lengths = list[tuple[int, int]]


def packed(samples: Lengths, max_tokens: int, max_crops: int) -> list[list[int]]:
    tokens, crops = np.array(samples, np.int64).reshape(-1, 2).T
    return pack(tokens, crops, tokens * (tokens + 1) // 2, max_tokens, max_crops)


def fewest(samples: Lengths, max_tokens: int, max_crops: int) -> int:
    """Number of packs of plain best-fit-decreasing, the long way."""
    scarce = sum(c for _, c in samples) * max_tokens > sum(t for t, _ in samples) * max_crops
    packs: list[list[int]] = []  # tokens and crops left
    for tokens, crops in sorted(samples, key=lambda sample: (-sample[0], -sample[1])):
        fitting = [left for left in packs if left[0] >= tokens and left[1] >= crops]
        left = min(fitting, key=lambda left: (left[scarce], left[1 - scarce]), default=None)
        if left is None:
            packs.append(left := [max_tokens, max_crops])
        left[0] -= tokens
        left[1] -= crops
    return len(packs)


@given(
    samples=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 12)), max_size=200),
    spare=st.tuples(st.integers(0, 200), st.integers(0, 30)),
)
def test_every_sample_once_no_limit_passed_and_no_pack_more_than_best_fit(
    samples: Lengths, spare: tuple[int, int]
) -> None:
    max_tokens = max((tokens for tokens, _ in samples), default=1) + spare[0]
    max_crops = max((crops for _, crops in samples), default=0) + spare[1]
    packs = packed(samples, max_tokens, max_crops)
    assert sorted(i for members in packs for i in members) == list(range(len(samples)))
    assert all(packs)
    for members in packs:
        assert sum(samples[i][0] for i in members) <= max_tokens
        assert sum(samples[i][1] for i in members) <= max_crops
    assert len(packs) <= fewest(samples, max_tokens, max_crops)
    assert packs == packed(samples, max_tokens, max_crops)


def test_dear_samples_are_spread_over_the_packs() -> None:
    """Two videos of half a pack each fit into one; beside texts they make two packs of like cost."""
    videos, texts = [(50, 8)] * 4, [(25, 0)] * 8
    packs = packed(videos + texts, 100, 16)
    assert sorted(sum(i < 4 for i in members) for members in packs) == [1, 1, 1, 1]
    assert {sum((videos + texts)[i][0] for i in members) for members in packs} == {100}


def test_text_fills_packs_whose_crops_are_used_up() -> None:
    videos, texts = [(60, 8)] * 5, [(40, 0)] * 5
    packs = packed(videos + texts, 100, 8)
    assert len(packs) == 5
    assert all(len(members) == 2 for members in packs)


def test_no_crops_at_all() -> None:
    assert sorted(map(len, packed([(5, 0), (5, 0), (3, 0)], 10, 0))) == [1, 2]
    assert packed([], 10, 0) == []


@pytest.mark.parametrize(
    ("max_tokens", "max_crops", "most"), [(4096, 10**6, 0.004), (16_384, 10**6, 0.002), (16_384, 100, 0.01)]
)
def test_little_is_left_over(max_tokens: int, max_crops: int, most: float) -> None:
    """Log-normal lengths, a crop for about 120 tokens: against what the scarcer limit allows at best."""
    rng = np.random.Generator(np.random.Philox(1))
    tokens = np.minimum(np.exp(rng.normal(6.3, 0.9, 4096)), max_tokens).astype(np.int64)
    crops = np.minimum(tokens // 120, max_crops)
    packs = pack(tokens, crops, tokens * (tokens + 1) // 2, max_tokens, max_crops)
    least = max(tokens.sum() / max_tokens, crops.sum() / max_crops)
    assert len(packs) <= np.ceil(least * (1 + most))
