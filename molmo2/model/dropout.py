"""Dropout on the outputs of sublayers (the residual branches), with masks that depend only on a token's place.

A mask is drawn from (seed, step, pack, sublayer, block of tokens) and never from a generator's state. It is therefore
the same after a resume, in recomputed activations, and for any distribution of packs over ranks. CPU and CUDA draw
different numbers from the same seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # tokens whose mask has one seed: a rank with a slice of a pack draws only the blocks of its slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """The dropout of one micro-batch, or of one slice of it.

    Attributes:
        rates: float32 [B, S] in [0, 1): the probability that a channel of a token is dropped.
        packs: a seed for each of the B rows, from (seed, step, pack).
        start: index in the pack of the slice's first token.
    """

    rates: Tensor
    packs: tuple[int, ...]
    start: int = 0

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """Apply dropout to [B, S, d], keeping the expectation; `place` is the index of the sublayer in the model."""
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        generator = torch.Generator(x.device)
        end = self.start + x.shape[1]
        for row, pack in enumerate(self.packs):
            for block in range(self.start // BLOCK, -(-end // BLOCK)):
                first, last = max(self.start, block * BLOCK), min(end, (block + 1) * BLOCK)
                generator.manual_seed(mixed(pack, place, block))
                drawn = torch.rand(BLOCK, x.shape[2], generator=generator, device=x.device)
                own = slice(first - self.start, last - self.start)
                part = drawn[first - block * BLOCK : last - block * BLOCK]
                torch.lt(part, self.rates[row, own, None], out=dropped[row, own])
        return x.masked_fill(dropped, 0) * (1 / (1 - self.rates))[..., None].to(x.dtype)


def mixed(*numbers: int) -> int:
    """A seed below 2^63 from any integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
