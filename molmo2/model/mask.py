"""Who may see whom: Molmo2's attention rule on packed rows with message trees, from two vectors.

A token's segment id is `pack_member * 100_000 + branch`, the shared trunk being branch 10_000. A query sees a key when

    the key is no padding,
    the key's segment id is not smaller (its own branch, or its own trunk; never a later pack member), and
    the key is not later in the row, or both are visual tokens of the same pack member.

A padding token sees itself, so that no row of the softmax is empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MEMBER = 100_000
TRUNK = 10_000
PAD_SEGMENT = 2**31 - 1


@dataclass(slots=True)
class AttentionMask:
    """The rule for one batch: `segment_ids` int [B, S], `is_visual` bool [B, S]."""

    segment_ids: Tensor
    is_visual: Tensor
    _dense: Tensor | None = field(default=None, repr=False)

    def dense(self) -> Tensor:
        """Bool [B, 1, S, S], True where the query (axis 2) sees the key (axis 3). Made once."""
        if self._dense is None:
            self._dense = allowed(self.segment_ids, self.is_visual)
        return self._dense


@dataclass(slots=True)
class KeyMask:
    """Every query sees every valid key: one generated token after its prompt. `valid` bool [B, keys]."""

    valid: Tensor

    def dense(self) -> Tensor:
        """Bool [B, 1, 1, keys]."""
        return self.valid[:, None, None, :]


def allowed(segment_ids: Tensor, is_visual: Tensor) -> Tensor:
    """The dense rule, bool [B, 1, S, S]; S x S, so for short rows and for tests."""
    query, key = segment_ids[:, None, :, None], segment_ids[:, None, None, :]
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    causal = position[None, :] <= position[:, None]
    both_visual = is_visual[:, None, :, None] & is_visual[:, None, None, :]
    same_member = query // MEMBER == key // MEMBER
    seen = (key != PAD_SEGMENT) & (query <= key) & (causal | (both_visual & same_member))
    return seen | torch.eye(len(position), dtype=torch.bool, device=segment_ids.device)
