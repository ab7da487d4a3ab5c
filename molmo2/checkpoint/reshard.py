"""Continuing a run on another number of ranks, or with another ZeRO stage: the order of the data does not move.

DeepSpeed's files hold one part of the optimizer per rank. Its universal format holds every parameter whole; rank 0
converts to it, all ranks load it, and the converted copy is dropped. Another precision is another optimizer and stays
refused.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from molmo2.checkpoint.files import STATES, Checkpoint, CheckpointError
from molmo2.config import Recipe

PREFIX = ".universal-"
SHARED, PARTED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """What differs between the ranks that wrote a checkpoint and those that run now, as "world was 2, is 1".

    Raises:
        CheckpointError: a difference that cannot be bridged.
    """
    train = recipe.train
    now = {"world": dist.get_world_size(), "zero_stage": train.zero_stage, "precision": train.precision}
    found = {name: (checkpoint.meta[name], value) for name, value in now.items() if checkpoint.meta[name] != value}
    differing = [f"{name} was {was}, is {value}" for name, (was, value) in found.items()]
    # Stage 0 keeps a whole optimizer on every rank, which has no parts to put together or to hand out.
    if "precision" in found or ("zero_stage" in found and 0 in found["zero_stage"]):
        raise CheckpointError(
            f"{checkpoint.path}: cannot continue: {', '.join(differing)}; start it as it was, or begin a new run with "
            f"`init: {checkpoint.path}`"
        )
    return [] if train.zero_stage == 0 else differing


def convert(checkpoint: Checkpoint) -> Path:
    """Write the universal copy of a checkpoint beside it, and return where it is; one rank does it.

    Raises:
        CheckpointError: DeepSpeed's converter failed, for want of space, say.
    """
    target = checkpoint.path.with_name(PREFIX + checkpoint.path.name)
    shutil.rmtree(target, ignore_errors=True)
    folders = ["--input_folder", str(checkpoint.path / STATES), "--output_folder", str(target / STATES)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"{checkpoint.path}: cannot be converted for another number of ranks: {last}; the copy needs as much space "
            "as the checkpoint, and the file system must be one that all ranks see"
        )
    _bridge(target / STATES)
    return target


def _bridge(states: Path) -> None:
    """Add what the loader of the other kind of ZeRO stage looks for: DeepSpeed's converter does not cross stages.

    Stages 1 and 2 keep the weights whole in one file and a step count with each parameter; stage 3 keeps no weights
    there, and the step counts with the optimizer.
    """
    path = states / "zero" / "optimizer_state.pt"
    optimizer = torch.load(path, weights_only=False)  # written by our own run, and found whole by its hash
    folders = [folder for folder in (states / "zero").iterdir() if folder.is_dir()]
    if (states / PARTED).exists():
        step = optimizer["optimizer_state_dict"]["state"][0]["step"]
        model = torch.load(states / PARTED, weights_only=False)
        for name, shape in (item for group in model["param_shapes"] for item in group.items()):
            folder = states / "zero" / name
            torch.save(step, folder / "step.pt")
            for file in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"):
                torch.save({"param": torch.load(folder / file).view(shape)}, folder / file)
            model["module"][name] = torch.load(folder / "fp32.pt")["param"]
        torch.save(model, states / SHARED)
        torch.save(optimizer | {"ds_version": model["ds_version"]}, path)
    else:
        steps = [torch.load(folder / "step.pt") for folder in folders if (folder / "step.pt").exists()]
        kept = {"state": {0: {"step": torch.as_tensor(steps[0])}}, "param_groups": optimizer["param_groups"]}
        model = torch.load(states / SHARED, weights_only=False)
        model["module"] = {name: torch.empty(0) for name in model["module"]}
        torch.save(model, states / PARTED)
        torch.save(optimizer | {"optimizer_state_dict": kept}, path)
