"""Dropout on the outputs of sublayers (the residual branches), with masks that depend only on an element's place.

A mask is a hash of (seed, step, pack, sublayer, token, channel) in integer arithmetic, and never of a generator's
state. It is therefore the same after a resume, in recomputed activations, for any distribution of packs over ranks, for
any slice of a pack and on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# A 32-bit mixer: every bit of the input changes each bit of the output with a probability near 1/2. Shifts of int32 are
# arithmetic, so the bits that they fill in are cut off. Factors above 2^31 are written as their negative equivalents.
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
LAST_SHIFT = 16
CHANNEL, SUBLAYER = 0x5BD1E995, 0x2545F491  # odd factors that spread small numbers over 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """The dropout of one micro-batch, or of one slice of it.

    Attributes:
        rates: float32 [B, S] in [0, 1): the probability that a channel of a token is dropped.
        seeds: int32 [B, 2], the seed of each row, from (seed, step, pack); see `seed_words`.
        start: index in the pack of the slice's first token.
    """

    rates: Tensor
    seeds: Tensor
    start: int = 0

    def keys(self, sublayers: int) -> Tensor:
        """The keys of the masks of so many sublayers, int32 [sublayers, B, 2]."""
        places = (torch.arange(1, sublayers + 1, device=self.seeds.device) * SUBLAYER % 2**31).int()
        return _mixed(self.seeds ^ places[:, None, None])

    def __call__(self, x: Tensor, keys: Tensor) -> Tensor:
        """Apply dropout to [B, S, d], keeping the expectation; `keys`: int32 [B, 2], those of the sublayer."""
        token = torch.arange(self.start, self.start + x.shape[1], dtype=torch.int32, device=x.device)
        channel = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
        first, second = _mixed(_mixed(keys[:, :, None] + token) ^ keys.flip(1)[:, :, None])[..., None].unbind(1)
        bits = _mixed(first ^ _mixed(channel * CHANNEL), second)
        dropped = (bits & (2**31 - 1)) < (self.rates * 2**31).int()[..., None]
        return x.masked_fill(dropped, 0) * (1 / (1 - self.rates))[..., None].to(x.dtype)


def _mixed(x: Tensor, added: Tensor | int = 0) -> Tensor:
    """Mix the bits of int32 numbers; `added` enters between the two rounds."""
    (shift, factor), (next_shift, next_factor) = ROUNDS
    x = (x ^ _shifted(x, shift)) * factor + added
    x = (x ^ _shifted(x, next_shift)) * next_factor
    return x ^ _shifted(x, LAST_SHIFT)


def _shifted(x: Tensor, places: int) -> Tensor:
    return (x >> places) & (2 ** (32 - places) - 1)


def seed_words(seeds: Iterable[tuple[int, ...]]) -> Tensor:
    """One seed from each tuple of integers: int32 [n, 2], on the CPU."""
    digests = b"".join(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest() for numbers in seeds)
    return torch.frombuffer(bytearray(digests), dtype=torch.int32).view(-1, 2)
