"""The order of a row's tokens in which the visual tokens of each sample's trunk come before its other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2.model.mask import MEMBER, TRUNK


def visual_first_order(segment_ids: Tensor, is_visual: Tensor) -> Tensor:
    """The place where each token of the new order stands now, int64 [B, S]; branches and samples stay in their order.

    `segment_ids` int [B, S] and `is_visual` bool [B, S] are those of `AttentionMask`.
    """
    in_trunk = segment_ids % MEMBER == TRUNK
    place = torch.where(in_trunk, torch.where(is_visual, 0, 1), 2)
    return (segment_ids.long() // MEMBER * 3 + place).argsort(dim=1, stable=True)
