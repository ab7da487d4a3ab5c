"""What the ranks of test_check_sp do."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engine_cases import model, recipe
from torch import Tensor

from molmo2.config import Recipe
from molmo2.parallel import vision
from molmo2.parallel.mesh import MeshError, make_mesh
from molmo2.parallel.ulysses import ulysses
from molmo2.training import engine
from molmo2.training.check_sp import check_sequence_parallel

LENGTH = 192  # tokens of a pack of the runs that are checked


def run_of(**train: Any) -> Recipe:
    run = recipe(sp=2, **train)
    return run.model_copy(update={"data": run.data.model_copy(update={"sequence_length": LENGTH})})


HALF = {"precision": "bf16", "zero_stage": 2}
SOUND = {
    "fp32": run_of(),
    "fp32, nothing recomputed": run_of(recompute="none", residual_dropout=0.2),
    "fp32, offload": run_of(zero_stage=3, offload=["activations"]),
    "fp32, light": run_of(recompute="light"),
    "bf16": run_of(**HALF),
}


def attention(wrong: Callable[[Tensor, Tensor], bool]) -> AbstractContextManager[Any]:
    """Shared attention whose heads are swapped where `wrong(its output, the queries of the whole sequence)` holds."""

    def faulty(attend: Any, mesh: Any, num_heads: int, num_kv_heads: int) -> Any:
        if mesh.sp_group is None:
            return attend

        def local(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            out = attend(q, k, v, mask)
            return torch.roll(out, 1, dims=1) if wrong(out, q) else out

        return ulysses(local, mesh, num_heads, num_kv_heads)

    return mock.patch.object(engine, "ulysses", faulty)


class Recomputed:
    """Whether a layer's attention runs for the second time: in the order of `model`'s two layers, calls 3 and 4."""

    calls = 0

    def __call__(self, out: Tensor, q: Tensor) -> bool:
        self.calls += 1
        return self.calls > 2


def module(change: Callable[[Any], None]) -> AbstractContextManager[Any]:
    """A module that is changed after it was made, where packs are shared."""
    original = engine.TrainingModule.__init__

    def init(self: Any, model: Any, recipe: Any, mesh: Any) -> None:
        original(self, model, recipe, mesh)
        if mesh.sp > 1:
            change(self)

    return mock.patch.object(engine.TrainingModule, "__init__", init)


def detached_vision() -> AbstractContextManager[Any]:
    gather = vision.all_gather
    return mock.patch.object(vision, "all_gather", lambda x, mesh: gather(x, mesh).detach() + 0 * x.sum())


def scale_matrix(made: Any) -> None:
    made.model.text.layers[0].down_proj.weight.register_hook(lambda gradient: 1.01 * gradient)


def raise_z_loss(made: Any) -> None:
    if dist.get_rank() == 0:
        made.train_settings = made.train_settings.model_copy(update={"z_loss": 1.0})


FAULTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Recipe]] = {
    "heads": (lambda: attention(lambda out, q: True), run_of()),
    "heads, in the length of the run": (lambda: attention(lambda out, q: q.shape[2] == LENGTH), run_of()),
    "heads, in bfloat16": (lambda: attention(lambda out, q: q.dtype == torch.bfloat16), run_of(**HALF)),
    "heads, when recomputed": (lambda: attention(Recomputed()), run_of()),
    "gradient of vision": (detached_vision, run_of()),
    "gradient of one matrix": (lambda: module(scale_matrix), run_of()),
    "loss of one rank": (lambda: module(raise_z_loss), run_of()),
}


def sound(names: list[str]) -> dict[str, dict[str, float]]:
    """The differences of some runs with nothing broken."""
    mesh = make_mesh(2)
    return {name: _check(mesh, SOUND[name]) for name in names}


def check(argument: None) -> tuple[dict[str, dict[str, float]], dict[str, str | None]]:
    """The differences of every sound run, and for every fault the error's text."""
    found, mesh = sound(list(SOUND)), make_mesh(2)
    return found, {name: _refused(mesh, fault, run) for name, (fault, run) in FAULTS.items()}


def _check(mesh: Any, run: Recipe) -> dict[str, float]:
    return check_sequence_parallel(model(), run, mesh, torch.device("cpu"))


def _refused(mesh: Any, fault: Callable[[], AbstractContextManager[Any]], run: Recipe) -> str | None:
    with fault():
        try:
            _check(mesh, run)
        except MeshError as error:
            return str(error)
    return None
