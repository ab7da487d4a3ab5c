"""A differentiable all-gather: equal blocks of all ranks of a group, concatenated."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.parallel.mesh import Mesh


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        value = value.contiguous()
        blocks = [torch.empty_like(value) for _ in range(mesh.sp)]
        dist.all_gather(blocks, value, group=mesh.sp_group)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.mesh.sp_group)
        return total.chunk(ctx.mesh.sp)[ctx.mesh.sp_rank], None


def all_gather(value: Tensor, mesh: Mesh) -> Tensor:
    """Gather one block of equal shape from each rank, concatenated on dim 0; backward sums the gradients of each block.

    The sum is correct if the loss is a sum over ranks. Every rank must run the backward, so every rank's loss must
    depend on the result.
    """
    gathered: Tensor = _AllGather.apply(value, mesh)
    return gathered
