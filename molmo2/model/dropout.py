"""Dropout on what a sublayer adds to the residual stream, with masks that depend on the place of a token alone.

A mask is drawn from (seed, step, pack, sublayer, block of tokens) and never from a state: a resumed run, activations
that are computed again, and ranks that share a pack or take other packs all see the same one. Kinds of device draw
other numbers from one seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # tokens that are drawn at once: a rank with a slice of a pack draws its own blocks and no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """The dropout of one micro-batch, or of one slice of it.

    Attributes:
        rates: float32 [B, S], in [0, 1): with what probability a token's channels are dropped.
        packs: a number for each of the B rows, from (seed, step, pack).
        start: where the slice begins in the pack.
    """

    rates: Tensor
    packs: tuple[int, ...]
    start: int = 0

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """[B, S, d] to the same, of equal expectation; `place` tells the sublayers of a model apart."""
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
