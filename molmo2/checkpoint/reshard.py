"""Resharding of checkpoints: a run resumes on another number of ranks or with another ZeRO stage, on the same batches.

DeepSpeed's files hold one part of the optimizer per rank. Its universal format holds every parameter whole: rank 0
converts a checkpoint to it, all ranks load it, and the converted copy is deleted. Another precision has another
optimizer and is refused.
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

PREFIX = ".universal-"  # begins the name of a converted copy
# DeepSpeed's file with the model's states: one for all ranks (ZeRO 0-2), or rank 0's part (ZeRO 3).
WHOLE, PARTITIONED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def mesh_changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Differences between the ranks that wrote a checkpoint and those that run now, as "world was 2, is 1".

    Raises:
        CheckpointError: a difference for which the checkpoint cannot be converted.
    """
    train = recipe.train
    now = {"world": dist.get_world_size(), "zero_stage": train.zero_stage, "precision": train.precision}
    changed = {name: (checkpoint.meta[name], value) for name, value in now.items() if checkpoint.meta[name] != value}
    differing = [f"{name} was {was}, is {value}" for name, (was, value) in changed.items()]
    # Stage 0 has the whole optimizer on every rank, and DeepSpeed cannot convert between it and the other stages.
    if "precision" in changed or ("zero_stage" in changed and 0 in changed["zero_stage"]):
        raise CheckpointError(
            f"{checkpoint.path}: cannot continue: {', '.join(differing)}; start it as it was, or begin a new run with "
            f"`init: {checkpoint.path}`"
        )
    return [] if train.zero_stage == 0 else differing


def convert_checkpoint(checkpoint: Checkpoint) -> Path:
    """Write the universal copy of a checkpoint beside it, and return its path; only one rank may call it.

    Raises:
        CheckpointError: DeepSpeed's converter failed, for example because the disk is full.
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
    """Add the files that the loaders of the other ZeRO stages need, which DeepSpeed's converter does not write.

    Stages 1 and 2 store the weights whole in one file and a step count with each parameter. Stage 3 stores no weights
    there, and the step counts with the optimizer.
    """
    path = states / "zero" / "optimizer_state.pt"
    optimizer = torch.load(path, weights_only=False)  # safe: our own run wrote it, and its hash was checked
    folders = [folder for folder in (states / "zero").iterdir() if folder.is_dir()]
    if (states / PARTITIONED).exists():
        step = optimizer["optimizer_state_dict"]["state"][0]["step"]
        model = torch.load(states / PARTITIONED, weights_only=False)
        for name, shape in (item for group in model["param_shapes"] for item in group.items()):
            folder = states / "zero" / name
            torch.save(step, folder / "step.pt")
            for file in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"):
                torch.save({"param": torch.load(folder / file).view(shape)}, folder / file)
            model["module"][name] = torch.load(folder / "fp32.pt")["param"]
        torch.save(model, states / WHOLE)
        torch.save(optimizer | {"ds_version": model["ds_version"]}, path)
    else:
        steps = [torch.load(folder / "step.pt") for folder in folders if (folder / "step.pt").exists()]
        state = {"state": {0: {"step": torch.as_tensor(steps[0])}}, "param_groups": optimizer["param_groups"]}
        model = torch.load(states / WHOLE, weights_only=False)
        model["module"] = {name: torch.empty(0) for name in model["module"]}
        torch.save(model, states / PARTITIONED)
        torch.save(optimizer | {"optimizer_state_dict": state}, path)
