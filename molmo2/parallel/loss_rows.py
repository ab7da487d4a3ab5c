"""The rows that carry loss, shared out evenly over the ranks that hold slices of one sequence.

In a long video the text stands at the end, so that without this every loss row would lie on the last rank, and with
it the whole of the head's work and of its logits. All ranks know the weights of the whole sequence, so nothing is
negotiated: each sends its own rows in one exchange and takes its equal part of them.
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


def share_loss_rows(hidden: Tensor, labels: Tensor, weights: Tensor, datasets: Tensor, mesh: Mesh) -> LossRows:
    """This rank's part of the rows with weight; one row of weight 0 where it gets none, so that the graph stays whole.

    Args:
        hidden: [B, S / sp, d], this rank's slice.
        labels: int64 [B, S], of the whole sequence.
        weights: float32 [B, S], likewise.
        datasets: int64 [B, S], likewise: which dataset a token comes from.
        mesh: this rank's place.
    """
    # By the rank that holds them: [sp, B * S / sp], the order in which the exchange brings the rows.
    whole = (labels, weights, datasets)
    labels, weights, datasets = (each.unflatten(1, (mesh.sp, -1)).transpose(0, 1).flatten(1) for each in whole)
    carries = weights > 0
    own = hidden.flatten(0, 1)
    rows = own[carries[mesh.sp_rank]]
    counts = carries.sum(1).tolist()
    if mesh.sp_group is not None and any(counts):
        block = max(counts)
        gathered = all_gather(F.pad(rows, (0, 0, 0, block - len(rows))), mesh)
        index = [rank * block + i for rank, count in enumerate(counts) for i in range(count)]
        rows = gathered[torch.tensor(index, device=rows.device)]
    share = -(-sum(counts) // mesh.sp)
    part = slice(mesh.sp_rank * share, (mesh.sp_rank + 1) * share)
    found = LossRows(rows[part], labels[carries][part], weights[carries][part], datasets[carries][part])
    if len(found.hidden):
        return found
    idle = rows[:1] if len(rows) else own[:1]
    return LossRows(idle, labels.new_zeros(1), weights.new_zeros(1), datasets.new_zeros(1))
