"""Redistribution of the rows that carry loss, in equal parts over the ranks that hold slices of one sequence."""

from __future__ import annotations

from torch import Tensor

from molmo2.parallel.gather import all_gather
from molmo2.parallel.mesh import Mesh
from molmo2.parallel.places import LossPlaces


def take_loss_rows(hidden: Tensor, places: LossPlaces, mesh: Mesh) -> Tensor:
    """The hidden states [n, d] whose loss this rank computes, from its slice [B, S / sp, d]; one all-gather."""
    rows = hidden.flatten(0, 1).index_select(0, places.sent)
    if mesh.sp_group is None:
        return rows
    return all_gather(rows, mesh).index_select(0, places.taken)
