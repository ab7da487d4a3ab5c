"""The mesh of ranks: data-parallel groups, each of `sp` neighbouring ranks that share one pack.

Ranks [i * sp, (i + 1) * sp) are one group, inside one node. DeepSpeed has no knowledge of the groups: it sees plain
data parallelism over all ranks.
"""

from __future__ import annotations

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


def check_mesh(*, world: int, sp: int, packs_per_step: int, micro_batch: int, num_heads: int) -> None:
    """Check that the packs of a step and the attention heads can be divided among the ranks.

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
    if broken:
        raise MeshError(
            f"{'; '.join(broken)} (ranks {world}, train.sp {sp}, train.packs_per_step {packs_per_step}, "
            f"train.micro_batch {micro_batch}, attention heads {num_heads}); change the recipe or the number of ranks"
        )


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
