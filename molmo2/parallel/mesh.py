"""The mesh of ranks: data-parallel groups, each of `sp` neighbouring ranks that share one pack.

Ranks [i * sp, (i + 1) * sp) are one group, on one machine unless the recipe allows more. DeepSpeed has no knowledge of
the groups: it sees plain data parallelism over all ranks.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


class MeshError(ValueError):
    """The numbers of ranks, packs and heads do not fit together; the message lists all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """This rank's place among the ranks. `sp_group` is None without sequence parallelism."""

    rank: int
    world: int
    sp: int
    sp_group: dist.ProcessGroup | None

    @property
    def dp(self) -> int:
        """The number of groups, which read different packs."""
        return self.world // self.sp

    @property
    def dp_rank(self) -> int:
        """The index of this rank's group, which determines the packs that it reads."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """The index of this rank in its group, which determines its slice of a pack."""
        return self.rank % self.sp


SINGLE = Mesh(rank=0, world=1, sp=1, sp_group=None)


def check_mesh(
    *,
    world: int,
    sp: int,
    packs_per_step: int,
    micro_batch: int,
    num_heads: int,
    machines: Sequence[str] = (),
    sp_across_machines: bool = False,
) -> None:
    """Check that packs and attention heads can be divided among the ranks, and that groups stay on one machine.

    `machines`: the machine of every rank; empty if they are not known. The other arguments are named as in a recipe.

    Raises:
        MeshError: a rule is broken; the message lists every broken rule and all numbers.
    """
    broken = []
    if world % sp:
        broken.append("the number of ranks must be a multiple of train.sp")
    elif packs_per_step % (world // sp * micro_batch):
        broken.append("train.packs_per_step must be a multiple of (ranks / sp) * train.micro_batch")
    if sp > num_heads:
        broken.append("train.sp may not exceed the attention heads: each rank takes whole heads")
    if not broken and not sp_across_machines:
        broken = _divided_groups(machines, sp)
    if broken:
        raise MeshError(
            f"{'; '.join(broken)} (ranks {world}, train.sp {sp}, train.packs_per_step {packs_per_step}, "
            f"train.micro_batch {micro_batch}, attention heads {num_heads}); change the recipe or the number of ranks"
        )


def _divided_groups(machines: Sequence[str], sp: int) -> list[str]:
    """What is wrong with the first group of ranks on more than one machine, if there is one."""
    for first in range(0, len(machines), sp):
        names = sorted(set(machines[first : first + sp]))
        if len(names) > 1:
            return [
                f"ranks {first}-{first + sp - 1} share a pack and run on {', '.join(names)}; every layer exchanges the "
                "whole pack, for which a network is slow: let train.sp divide the ranks of each machine, or set "
                "train.sp_across_machines=true"
            ]
    return []


def gather_machines() -> list[str]:
    """The name of the machine of every rank; collective."""
    names = [""] * dist.get_world_size()
    dist.all_gather_object(names, platform.node())
    return names


def make_mesh(sp: int) -> Mesh:
    """The mesh of the running process group; collective, since every rank creates every group in the same order."""
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % sp == 0  # `check_mesh`
    own: dist.ProcessGroup | None = None
    for first in range(0, world if sp > 1 else 0, sp):
        ranks = list(range(first, first + sp))
        group = dist.new_group(ranks)
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return Mesh(rank=rank, world=world, sp=sp, sp_group=own)
