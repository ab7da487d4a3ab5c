"""The order of samples in an epoch: keyed permutations of 0 .. n-1 that are computed and not stored.

A balanced Feistel network over the smallest even number of bits that holds n, applied until the value is below n (cycle
walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). All arithmetic is on integers, so the order
is the same on every platform and version of numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 6  # rounds of the Feistel network
GOLDEN = np.array(0x9E3779B97F4A7C15, np.uint64)  # 2^64 / golden ratio; numpy scalars warn on overflow
POWERS = np.uint64(1) << np.arange(63, dtype=np.uint64)
Ints = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


def key_of(*parts: int | str) -> int:
    """A 64-bit key derived from a purpose, such as ("order", seed, name)."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little")


def _mix(value: U64) -> U64:
    """The SplitMix64 finaliser (Steele, Lea and Flood, 2014), modulo 2^64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def epoch_keys(bases: U64, epochs: Ints) -> U64:
    """A key for each (base key, epoch), [k]."""
    return _mix(bases + epochs.astype(np.uint64) * GOLDEN)


def permute(positions: Ints, sizes: Ints, keys: U64) -> Ints:
    """Apply to each position the permutation of 0 .. size-1 that its key selects; all arguments are [k].

    For one size and key this is a bijection. One call evaluates many permutations, because a window draws a few
    positions from each of many datasets.
    """
    size = sizes.astype(np.uint64)
    half = ((np.searchsorted(POWERS, size - np.uint64(1), side="right") + 1) // 2).astype(np.uint64)
    value = positions.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        # Fewer than 3 values in 4 are outside, so few rounds are needed; the cycle of a position returns below size.
        value[outside] = _feistel(value[outside], half[outside], keys[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _feistel(value: U64, half: U64, keys: U64) -> U64:
    """A bijection on the numbers of 2 * half bits."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & low
    for number in range(1, ROUNDS + 1):
        round_keys = _mix(keys + np.array(number, np.uint64) * GOLDEN)
        left, right = right, left ^ (_mix(right + round_keys) & low)
    return (left << half) | right


def shuffled(size: int, key: int) -> Ints:
    """All of 0 .. size-1 in the order of `key`, [size]."""
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))
