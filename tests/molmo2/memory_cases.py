"""What a rank of test_start does: place the weights of a model of 17 M parameters, and note its peak of memory."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from engine_cases import recipe
from torch import Tensor

from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import make_mesh
from molmo2.training.start import place_weights

TINY = PRESETS["tiny"]
CONFIG = replace(TINY, text=replace(TINY.text, hidden_size=512, intermediate_size=2048, num_layers=4, num_heads=8,
                                    num_kv_heads=4, head_dim=64))  # fmt: skip


class Placed(NamedTuple):
    """Bytes of the parameters that a rank holds, of its peak above the start, and a sum over the whole weights."""

    held: int
    peak: int
    total: float


def resident(field: str) -> int:
    """A figure of this process in bytes: VmRSS now, VmHWM the peak since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Forget the peak of memory so far."""
    Path("/proc/self/clear_refs").write_text("5")


def place(settings: tuple[str, int]) -> Placed:
    """Place random weights, which only rank 0 has, in a precision and at a ZeRO stage."""
    precision, stage = settings
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    run, mesh = recipe(precision=precision, zero_stage=stage), make_mesh(1)
    with torch.device("meta"):
        shapes = Molmo2(CONFIG)
    weights: Iterator[tuple[str, Tensor]] | None = shapes.random_weights(0) if dist.get_rank() == 0 else None
    place_weights(
        TINY, run, mesh, torch.device("cpu"), Molmo2(TINY).random_weights(0) if weights else None, whole=False
    )
    reset_peak()
    before = resident("VmRSS")
    model = place_weights(CONFIG, run, mesh, torch.device("cpu"), weights, whole=False)
    peak = resident("VmHWM") - before
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    total = torch.stack([part.detach().double().sum() for part in parts]).sum()
    if stage == 3:
        dist.all_reduce(total)
    return Placed(sum(part.nbytes for part in parts), peak, total.item())


def place_all(settings: list[tuple[str, int]]) -> list[Placed]:
    """`place` for each pair of settings."""
    os.environ.setdefault("LOCAL_RANK", "0")
    return [place(pair) for pair in settings]
