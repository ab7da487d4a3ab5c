"""The number of pairs of tokens that the mask allows, from which follow the operations of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2.model.mask import MEMBER, PAD_SEGMENT, TRUNK


def attention_pairs(segment_ids: Tensor, is_visual: Tensor) -> int:
    """The number of pairs that Molmo2's mask allows, computed without the mask; padding tokens are not counted.

    It is correct for rows as the loader makes them: visual tokens are only in trunks, and a branch follows its trunk.

    Args:
        segment_ids: int [B, S], see `molmo2.model.mask`.
        is_visual: bool [B, S].
    """
    total = 0
    for row, visual in zip(segment_ids.long(), is_visual, strict=True):
        row, visual = row[row != PAD_SEGMENT], visual[row != PAD_SEGMENT]
        total += int(sum(_causal(count) for count in row.unique(return_counts=True)[1]))
        member, is_trunk = row // MEMBER, row % MEMBER == TRUNK
        size = int(member.max()) + 1 if len(row) else 0
        trunk, seeing = (torch.bincount(member[part], minlength=size) for part in (is_trunk, visual))
        total += int((trunk * torch.bincount(member[~is_trunk], minlength=size)).sum())  # a branch sees its trunk
        total += int((seeing * (seeing - 1) // 2).sum())  # visual tokens see later ones too
    return total


def _causal(count: Tensor) -> Tensor:
    return count * (count + 1) // 2
