"""The keyed permutations: bijections for every size, looked up one position at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.stream.order import epoch_keys, key_of, permute, shuffled


def whole(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, key_of("order", 0, "demo")])
def test_bijective_for_every_small_size(key: int) -> None:
    sizes = np.repeat(np.arange(1, 301), np.arange(1, 301))
    positions = np.concatenate([np.arange(size) for size in range(1, 301)])
    found = permute(positions, sizes, np.full(len(sizes), key, np.uint64))
    for size in range(1, 301):
        assert sorted(found[sizes == size]) == list(range(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 100_003])
def test_bijective_around_powers_of_two(size: int) -> None:
    assert len(np.unique(whole(size, 7))) == size
    assert whole(size, 7).max() == size - 1


@given(st.lists(st.tuples(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.floats(0, 1)), max_size=30))
def test_lookups_do_not_depend_on_their_neighbours(items: list[tuple[int, int, float]]) -> None:
    sizes = np.array([size for size, _, _ in items], np.int64)
    keys = np.array([key for _, key, _ in items], np.uint64)
    positions = np.array([min(size - 1, int(size * at)) for size, _, at in items], np.int64)
    found = permute(positions, sizes, keys)
    assert (found >= 0).all() and (found < sizes).all()
    for i in range(len(items)):
        one = slice(i, i + 1)
        assert permute(positions[one], sizes[one], keys[one])[0] == found[i]


def test_order_looks_shuffled() -> None:
    """No rank correlation with the input, nor between epochs; every position equally likely to be first."""
    bases = np.full(50, key_of("order", 3, "d"), np.uint64)
    keys = epoch_keys(bases, np.arange(50)).tolist()
    orders = np.array([whole(1000, key) for key in keys])
    straight = np.arange(1000)
    assert max(abs(np.corrcoef(order, straight)[0, 1]) for order in orders) < 0.15
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.15
    assert len(set(orders[:, 0].tolist())) > 40


def test_shuffled_holds_everything_once() -> None:
    assert sorted(shuffled(257, 5)) == list(range(257))
    assert shuffled(257, 5).tolist() != shuffled(257, 6).tolist()
    assert shuffled(0, 5).tolist() == []


def test_order_is_pinned() -> None:
    """These numbers must never change: checkpoints of running trainings depend on them."""
    assert key_of("order", 0, "demo") == 16718171717350676097
    assert whole(10, 42).tolist() == [1, 5, 2, 9, 8, 0, 7, 6, 3, 4]
    assert epoch_keys(np.array([42], np.uint64), np.array([3])).tolist() == [5139283748462763858]
