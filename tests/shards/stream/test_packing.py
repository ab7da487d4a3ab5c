"""Packing: nothing lost, nothing over a limit, little room left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.packing import pack

Lengths = list[tuple[int, int]]


def packed(samples: Lengths, max_tokens: int, max_crops: int) -> list[list[int]]:
    tokens, crops = np.array(samples, np.int64).reshape(-1, 2).T
    return pack(tokens, crops, max_tokens, max_crops)


@given(
    samples=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 12)), max_size=200),
    spare=st.tuples(st.integers(0, 200), st.integers(0, 30)),
)
def test_every_sample_once_and_no_limit_passed(samples: Lengths, spare: tuple[int, int]) -> None:
    max_tokens = max((tokens for tokens, _ in samples), default=1) + spare[0]
    max_crops = max((crops for _, crops in samples), default=0) + spare[1]
    packs = packed(samples, max_tokens, max_crops)
    assert sorted(i for members in packs for i in members) == list(range(len(samples)))
    for members in packs:
        assert sum(samples[i][0] for i in members) <= max_tokens
        assert sum(samples[i][1] for i in members) <= max_crops
    # No two packs could be one: the later one would have gone into the earlier.
    for i, one in enumerate(packs):
        for other in packs[:i]:
            both = [samples[k] for k in (*one, *other)]
            assert sum(t for t, _ in both) > max_tokens or sum(c for _, c in both) > max_crops
    assert packs == packed(samples, max_tokens, max_crops)


def test_the_example_of_the_docstring() -> None:
    assert packed([(7, 1), (3, 0), (6, 4), (3, 1)], 10, 4) == [[0, 3], [2, 1]]


def test_text_fills_packs_whose_crops_are_used_up() -> None:
    videos, texts = [(60, 8)] * 5, [(40, 0)] * 5
    packs = packed(videos + texts, 100, 8)
    assert len(packs) == 5
    assert all(len(members) == 2 for members in packs)


def test_no_crops_at_all() -> None:
    assert packed([(5, 0), (5, 0), (3, 0)], 10, 0) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("max_tokens", "max_crops", "most"), [(4096, 10**6, 0.004), (16_384, 10**6, 0.002), (16_384, 100, 0.01)]
)
def test_little_is_left_over(max_tokens: int, max_crops: int, most: float) -> None:
    """Log-normal lengths, a crop for about 120 tokens: against what the scarcer limit allows at best."""
    rng = np.random.Generator(np.random.Philox(1))
    tokens = np.minimum(np.exp(rng.normal(6.3, 0.9, 4096)), max_tokens).astype(np.int64)
    crops = np.minimum(tokens // 120, max_crops)
    packs = pack(tokens, crops, max_tokens, max_crops)
    least = max(tokens.sum() / max_tokens, crops.sum() / max_crops)
    assert len(packs) <= np.ceil(least * (1 + most))
