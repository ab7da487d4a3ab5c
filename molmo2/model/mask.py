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
BLOCK = 128  # queries and keys in a block of FlexAttention's kernels

Made = TypeVar("Made")


@dataclass(slots=True)
class AttentionMask:
    """The mask of one batch, as two or three vectors.

    Attributes:
        segment_ids: int [B, S].
        is_visual: bool [B, S].
        order: int [B, S], places in the row by which one token is later than another, if not those where they stand.
    """

    segment_ids: Tensor
    is_visual: Tensor
    order: Tensor | None = None
    _made: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """All three."""
        return self.segment_ids, self.is_visual, self.order

    def made(self, make: Callable[[Tensor, Tensor, Tensor | None], Made]) -> Made:
        """The result of `make` for the vectors; it is computed once and cached for all layers."""
        if make not in self._made:
            self._made[make] = make(*self.vectors)
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


def row_order(segment_ids: Tensor) -> Tensor:
    """The places where the tokens of segment_ids [B, S] stand, [B, S]."""
    return torch.arange(segment_ids.shape[1], device=segment_ids.device).expand(segment_ids.shape)


def allowed(
    segment_ids: Tensor,
    is_visual: Tensor,
    order: Tensor | None = None,
    queries: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """The dense mask of some queries and keys: bool [B, 1, queries, keys]."""
    place = row_order(segment_ids)
    order = place if order is None else order

    def pair(vector: Tensor) -> tuple[Tensor, Tensor]:
        return vector[:, None, queries, None], vector[:, None, None, keys]

    (query, key), (query_order, key_order), (query_place, key_place) = map(pair, (segment_ids, order, place))
    both_visual = torch.logical_and(*pair(is_visual))
    same_member = query // MEMBER == key // MEMBER
    seen = (key != PAD_SEGMENT) & (query <= key) & ((key_order <= query_order) | (both_visual & same_member))
    return seen | (query_place == key_place)
