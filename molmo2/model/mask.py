"""The attention mask: Molmo2's rule for packed rows with message trees, defined by two vectors.

A token's segment id is `pack_member * 100_000 + branch`, the shared trunk being branch 10_000. A query sees a key when

    the key is not padding,
    the key's segment id is not smaller (its own branch, or its own trunk; never a later pack member), and
    the key is not later in the row, or both are visual tokens of the same pack member.

A padding token sees itself, so that no row of the softmax is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

MEMBER = 100_000  # factor of the pack member in a segment id
TRUNK = 10_000  # branch number of the shared trunk
PAD_SEGMENT = 2**31 - 1  # segment id of padding tokens

Made = TypeVar("Made")


@dataclass(slots=True)
class AttentionMask:
    """The mask of one batch, as two vectors: `segment_ids` int [B, S], `is_visual` bool [B, S]."""

    segment_ids: Tensor
    is_visual: Tensor
    _made: dict[object, object] = field(default_factory=dict, repr=False)

    def made(self, make: Callable[[Tensor, Tensor], Made]) -> Made:
        """The result of `make` for the two vectors; it is computed once and cached for all layers."""
        if make not in self._made:
            self._made[make] = make(self.segment_ids, self.is_visual)
        return self._made[make]  # type: ignore[return-value]

    def dense(self) -> Tensor:
        """Bool [B, 1, S, S], True where the query (axis 2) sees the key (axis 3)."""
        return self.made(allowed)


@dataclass(slots=True)
class KeyMask:
    """The mask of one generated token: it sees every valid key of its prompt. `valid`: bool [B, keys]."""

    valid: Tensor

    def dense(self) -> Tensor:
        """Bool [B, 1, 1, keys]."""
        return self.valid[:, None, None, :]


def allowed(segment_ids: Tensor, is_visual: Tensor, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
    """The dense mask of some queries and keys: bool [B, 1, queries, keys]."""
    query, key = segment_ids[:, None, queries, None], segment_ids[:, None, None, keys]
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    query_position, key_position = position[queries, None], position[None, keys]
    both_visual = is_visual[:, None, queries, None] & is_visual[:, None, None, keys]
    same_member = query // MEMBER == key // MEMBER
    seen = (key != PAD_SEGMENT) & (query <= key) & ((key_position <= query_position) | (both_visual & same_member))
    return seen | (query_position == key_position)
