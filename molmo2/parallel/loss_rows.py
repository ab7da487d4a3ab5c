"""Redistribution of the rows that carry loss, in equal parts over the ranks that hold slices of one sequence.

In a long video the text is at the end. Without redistribution the last rank would have every loss row, and with them
all of the head's work and logits. All ranks know the weights of the whole sequence, so the parts need no negotiation:
one all-gather exchanges the rows, and each rank takes its part of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2.parallel.gather import all_gather
from molmo2.parallel.mesh import Mesh


class LossRows(NamedTuple):
    """Rows [n, d] of final hidden states, labels and datasets int64 [n], weights float32 [n]; n is 1 or more."""

    hidden: Tensor
    labels: Tensor
    weights: Tensor
    datasets: Tensor


def split_loss_rows(hidden: Tensor, labels: Tensor, weights: Tensor, datasets: Tensor, mesh: Mesh) -> LossRows:
    """This rank's part of the rows with weight > 0; a rank without any gets one row of weight 0, to keep the graph.

    Args:
        hidden: [B, S / sp, d], this rank's slice.
        labels: int64 [B, S], for the whole sequence.
        weights: float32 [B, S], for the whole sequence.
        datasets: int64 [B, S], the dataset of each token, for the whole sequence.
        mesh: this rank's place.
    """
    # Order the columns by the rank that holds them, [sp, B * S / sp], as the all-gather orders the rows.
    columns = (labels, weights, datasets)
    labels, weights, datasets = (c.unflatten(1, (mesh.sp, -1)).transpose(0, 1).flatten(1) for c in columns)
    carries = weights > 0
    own = hidden.flatten(0, 1)
    rows = own[carries[mesh.sp_rank]]
    counts = carries.sum(1).tolist()
    if mesh.sp_group is not None and any(counts):
        block = max(counts)
        gathered = all_gather(F.pad(rows, (0, 0, 0, block - len(rows))), mesh)
        index = [rank * block + i for rank, count in enumerate(counts) for i in range(count)]
        rows = gathered[torch.tensor(index, device=rows.device)]
    size = -(-sum(counts) // mesh.sp)
    part = slice(mesh.sp_rank * size, (mesh.sp_rank + 1) * size)
    loss_rows = LossRows(rows[part], labels[carries][part], weights[carries][part], datasets[carries][part])
    if len(loss_rows.hidden):
        return loss_rows
    idle = rows[:1] if len(rows) else own[:1]
    return LossRows(idle, labels.new_zeros(1), weights.new_zeros(1), datasets.new_zeros(1))
