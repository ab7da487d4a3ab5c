"""Another order of the tokens of a row: in the trunk of each sample the visual tokens come before the others.

The frames of a video stand between the words that give their times, and a block of attention that holds both is partly
masked: the kernel has to look at every pair in it. With the visual tokens together most blocks are allowed as a whole.
The result is the model's own: positions, labels and weights go with their tokens, and the mask compares the order in
which tokens stood before. Only dropout differs, which depends on a token's place. Branches stay where they are.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from molmo2.model.visual_order import visual_first_order
from shards.stream.collate import Batch

TOKENS = ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids", "is_visual", "dataset_ids")


def visual_first(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch in the other order, and the place where each of its tokens stood before, int32 [B, S]."""
    order = visual_first_order(batch.segment_ids, batch.is_visual)
    moved = {name: getattr(batch, name).gather(1, order) for name in TOKENS}
    return dataclasses.replace(batch, **moved), order.int()
