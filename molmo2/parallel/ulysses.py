"""Ulysses sequence parallelism: every rank has a slice of the sequence and, in attention, a part of the heads.

    [B, heads, S / sp, D]  --all-to-all-->  [B, heads / sp, S, D]  attend  --all-to-all-->  [B, heads, S / sp, D]

Queries, keys and values are exchanged in one collective and the output in another: two collectives a layer. The
attention in the middle is any function of type `Attend`, with the mask of the whole sequence. The number of ranks need
not divide the numbers of heads: `plan_heads` repeats heads by index, and a key/value head that several ranks read is
sent to each of them. The model applies rotary embeddings before, with the positions of the slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.parallel.mesh import Mesh

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """The assignment of heads to P ranks.

    `query`: P * num_query head numbers in the order of the ranks; the last head is repeated to fill the last ranks.
    `key`: P * num_key key/value head numbers, likewise. `local[r]`: for each query head of rank r the position of its
    key head among the rank's key heads; `local` is None if plain grouping (equal consecutive parts) gives the same.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    num_query: int
    num_key: int
    local: tuple[tuple[int, ...], ...] | None


def plan_heads(num_heads: int, num_kv_heads: int, ranks: int) -> HeadPlan:
    """Divide heads among ranks in contiguous parts; `num_heads` must be a multiple of `num_kv_heads`."""
    assert num_heads % num_kv_heads == 0
    share, group = -(-num_heads // ranks), num_heads // num_kv_heads
    query = [[min(r * share + i, num_heads - 1) for i in range(share)] for r in range(ranks)]
    key = [sorted({head // group for head in heads}) for heads in query]
    num_key = max(len(heads) for heads in key)
    local = tuple(tuple(k.index(head // group) for head in q) for q, k in zip(query, key, strict=True))
    key = [heads + heads[-1:] * (num_key - len(heads)) for heads in key]
    grouped = tuple(i * num_key // share for i in range(share))
    regular = share % num_key == 0 and all(positions == grouped for positions in local)
    return HeadPlan(
        query=tuple(head for heads in query for head in heads),
        key=tuple(head for heads in key for head in heads),
        num_query=share,
        num_key=num_key,
        local=None if regular else local,
    )


class _AllToAll(torch.autograd.Function):
    """Equal-split all-to-all over dim 0, which has one entry per rank; its backward is the same all-to-all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


def _exchange(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    value = value.contiguous()
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, value, group=group)
    return out


def ulysses(attend: Attend, mesh: Mesh, num_heads: int, num_kv_heads: int) -> Attend:
    """`attend` for sequences that are split over `mesh.sp` ranks; `attend` itself when they are not.

    The result takes q [B, H, S / sp, D] and k, v [B, Hkv, S / sp, D] of this rank's slice and the mask of the whole
    sequence, and returns [B, H, S / sp, D]. Every rank of the group must call it.
    """
    if mesh.sp_group is None:
        return attend
    group, ranks = mesh.sp_group, mesh.sp
    plan = plan_heads(num_heads, num_kv_heads, ranks)

    @functools.cache  # one copy for each device, not one for each layer
    def indices(device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        own = None if plan.local is None else torch.tensor(plan.local[mesh.sp_rank], device=device)
        return torch.tensor(plan.query, device=device), torch.tensor(plan.key, device=device), own

    def parallel_attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        batch, _, length, dim = q.shape
        query, key, own = indices(q.device)
        parts = [q.index_select(1, query), k.index_select(1, key), v.index_select(1, key)]
        sent = torch.cat([part.view(batch, ranks, -1, length, dim) for part in parts], dim=2)
        received = _AllToAll.apply(sent.movedim(1, 0), group)  # [P, B, heads, S / P, D]
        whole = received.permute(1, 2, 0, 3, 4).reshape(batch, -1, ranks * length, dim)
        q, k, v = whole.split([plan.num_query, plan.num_key, plan.num_key], dim=1)
        if own is not None:
            k, v = k.index_select(1, own), v.index_select(1, own)
        out = attend(q, k, v, mask).reshape(batch, plan.num_query, ranks, length, dim)
        back = _AllToAll.apply(out.permute(2, 0, 1, 3, 4), group)  # [P, B, heads, S / P, D]
        return back.movedim(0, 1).reshape(batch, -1, length, dim)[:, :num_heads]

    return parallel_attend
