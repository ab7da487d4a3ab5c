"""A differentiable all-gather: equal blocks of all ranks of a group, concatenated; and that of the rows with loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.parallel.mesh import Mesh
from molmo2.parallel.places import LossPlaces


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        gathered = value.new_empty(mesh.sp * value.shape[0], *value.shape[1:])
        dist.all_gather_into_tensor(gathered, value.contiguous(), group=mesh.sp_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous()
        own = whole.new_empty(whole.shape[0] // ctx.mesh.sp, *whole.shape[1:])
        dist.reduce_scatter_tensor(own, whole, group=ctx.mesh.sp_group)
        return own, None


def all_gather(value: Tensor, mesh: Mesh) -> Tensor:
    """Gather one block of equal shape from each rank, concatenated on dim 0; backward sums the gradients of each block.

    The sum is correct if the loss is a sum over ranks. Every rank must run the backward, so every rank's loss must
    depend on the result.
    """
    gathered: Tensor = _AllGather.apply(value, mesh)
    return gathered


def take_loss_rows(hidden: Tensor, places: LossPlaces, mesh: Mesh) -> Tensor:
    """The hidden states [n, d] whose loss this rank computes, from its slice [B, S / sp, d]; one all-gather."""
    rows = hidden.flatten(0, 1).index_select(0, places.sent)
    if mesh.sp_group is None:
        return rows
    return all_gather(rows, mesh).index_select(0, places.taken)
