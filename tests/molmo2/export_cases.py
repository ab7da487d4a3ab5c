"""What the ranks of test_export_ranks do: one step under a ZeRO stage, a checkpoint in mid-run, the live weights."""

import os
from typing import Any

import deepspeed
import engine_cases
import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.checkpoint.files import save
from molmo2.parallel.mesh import make_mesh
from molmo2.training.engine import start_engine
from molmo2.training.optim import set_learning_rates

SETTINGS = {  # ranks -> precision and ZeRO stage; 3 ranks divide no tensor evenly, so that DeepSpeed pads
    2: [("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 3)],
    3: [("fp32", 2), ("fp32", 3), ("bf16", 2)],
}
PLAN = {"identity": {"weights": {"toy": 2**32}}}


def run_name(precision: str, stage: int) -> str:
    return f"{precision}-{stage}-{dist.get_world_size()}"


def live_weights(engine: Any) -> dict[str, Tensor]:
    """The whole parameters that the next forward would use."""
    parameters = dict(engine.module.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def save_in_mid_run(root: str) -> dict[str, dict[str, Tensor]]:
    """Every rank sees the same batch, so that the step is the same for any number of ranks."""
    os.environ["MOLMO2_DATA"] = root
    live = {}
    for precision, stage in SETTINGS[dist.get_world_size()]:
        run = engine_cases.recipe(run_name(precision, stage), precision=precision, zero_stage=stage, steps=6)
        mesh = make_mesh(1)
        engine, optimizer, names = start_engine(engine_cases.model(), run, mesh)
        set_learning_rates(optimizer, names, run.optim, 1, 6)
        loss, _ = engine(engine.module.place(engine_cases.batch(1, 2, divisor=10.0 * mesh.world)))
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        assert engine.was_step_applied()
        live[run.name] = live_weights(engine)
        save(engine, run, engine_cases.CONFIG, 1, PLAN, sp=1)
        engine.destroy()
    assert all(torch.isfinite(tensor).all() for weights in live.values() for tensor in weights.values())
    return live
