"""What the ranks of test_check_sp do."""

from typing import Any

import torch
import torch.distributed as dist
from engine_cases import model, recipe
from torch import Tensor

from molmo2.parallel import vision
from molmo2.parallel.mesh import MeshError, make_mesh
from molmo2.training import engine
from molmo2.training.check_sp import check_sequence_parallel


def check(fault: str | None) -> dict[str, float] | str:
    """The differences, or the error's text, with something broken on the way."""
    mesh = make_mesh(2)
    run = recipe(sp=mesh.sp)
    if fault == "heads":
        engine.ulysses = _swapped_heads  # type: ignore[assignment]
    if fault == "vision gradient":
        gather = vision.all_gather
        vision.all_gather = lambda x, mesh: gather(x, mesh).detach() + 0 * x.sum()
    if fault == "one rank's loss" and dist.get_rank() == 0:
        run = run.model_copy(update={"train": run.train.model_copy(update={"z_loss": 1.0})})
        mesh_run = recipe(sp=mesh.sp)
        original = engine.TrainingModule.__init__

        def init(self: Any, model: Any, recipe: Any, mesh: Any) -> None:
            original(self, model, run if mesh.sp > 1 else mesh_run, mesh)

        engine.TrainingModule.__init__ = init  # type: ignore[method-assign]
    try:
        return check_sequence_parallel(model(), run, mesh)
    except MeshError as error:
        return str(error)


def _swapped_heads(attend: Any, mesh: Any, num_heads: int, num_kv_heads: int) -> Any:
    from molmo2.parallel.ulysses import ulysses

    right = ulysses(attend, mesh, num_heads, num_kv_heads)
    if mesh.sp_group is None:
        return right

    def wrong(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return torch.roll(right(q, k, v, mask), 1, dims=1)

    return wrong
