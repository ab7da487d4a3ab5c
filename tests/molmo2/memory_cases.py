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

from molmo2.config import FirstWeights
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import make_mesh
from molmo2.training.start import in_order, place_weights
from molmo2.weights.pretrained import first_weights

TINY = PRESETS["tiny"]
TEXT = replace(TINY.text, hidden_size=512, intermediate_size=2048, num_layers=4, num_heads=8, num_kv_heads=4)
CONFIG = replace(TINY, text=replace(TEXT, head_dim=64), overlap_margin=4)  # the margin is not in a config.json


class Start(NamedTuple):
    """How weights are placed: random ones, or those of a released model in a directory."""

    precision: str
    zero_stage: int
    directory: str | None = None


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


def weights_of(start: Start) -> Iterator[tuple[str, Tensor]]:
    """The weights to place; nothing is read yet."""
    if start.directory is None:
        with torch.device("meta"):
            return Molmo2(CONFIG).random_weights(0)
    readers = first_weights(FirstWeights(molmo2=start.directory), CONFIG, Path(start.directory), 0, lambda text: None)
    return in_order(CONFIG, readers)


def place(start: Start) -> Placed:
    """Place weights that only rank 0 has, in a precision and at a ZeRO stage."""
    precision, stage, _ = start
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
    run, mesh = recipe(precision=precision, zero_stage=stage), make_mesh(1)
    first = dist.get_rank() == 0
    place_weights(TINY, run, mesh, torch.device("cpu"), Molmo2(TINY).random_weights(0) if first else None, whole=False)
    reset_peak()
    before = resident("VmRSS")
    weights = weights_of(start) if first else None
    model = place_weights(CONFIG, run, mesh, torch.device("cpu"), weights, whole=False)
    peak = resident("VmHWM") - before
    parts = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    total = torch.stack([part.detach().double().sum() for part in parts]).sum()
    if stage == 3:
        dist.all_reduce(total)
    return Placed(sum(part.nbytes for part in parts), peak, total.item())


def place_all(starts: list[Start]) -> list[Placed]:
    """`place` for each start."""
    os.environ.setdefault("LOCAL_RANK", "0")
    return [place(start) for start in starts]
