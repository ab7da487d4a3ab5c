"""Resharding of checkpoints: a run resumes on another number of ranks or with another ZeRO stage, on the same batches.

DeepSpeed's files hold one part of the optimizer per rank. Its universal format holds every parameter whole: rank 0
converts a checkpoint to it, all ranks load it, and the converted copy is deleted. At ZeRO stage 0, where every rank has
the whole optimizer, DeepSpeed neither writes nor reads that format; this module does. Another precision has another
optimizer and is refused.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from molmo2.checkpoint.files import OPTIMIZED, STATES, Checkpoint, CheckpointError

PREFIX = ".universal-"  # begins the name of a converted copy
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states of a parameter, beside its step count
# DeepSpeed's file with the model's states: one for all ranks (ZeRO 0-2), or rank 0's part (ZeRO 3).
WHOLE, PARTITIONED = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def convert_checkpoint(checkpoint: Checkpoint) -> Path:
    """Write the universal copy of a checkpoint beside it, and return its path; only one rank may call it.

    Raises:
        CheckpointError: DeepSpeed's converter failed, for example because the disk is full.
    """
    target = checkpoint.path.with_name(PREFIX + checkpoint.path.name)
    shutil.rmtree(target, ignore_errors=True)
    if checkpoint.meta["zero_stage"] == 0:
        _convert_whole(checkpoint, target / STATES)
    else:
        _convert_partitions(checkpoint, target)
    _bridge(target / STATES)
    return target


def _convert_partitions(checkpoint: Checkpoint, target: Path) -> None:
    """Have DeepSpeed convert a checkpoint of ZeRO 1-3, in a process of its own."""
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


def _convert_whole(checkpoint: Checkpoint, target: Path) -> None:
    """Write the files that `_convert_partitions` writes for ZeRO 1 and 2 from a checkpoint of ZeRO 0."""
    model = torch.load(checkpoint.path / STATES / WHOLE, map_location="cpu", mmap=True, weights_only=False)
    names, optimizer = model.get(OPTIMIZED), model["optimizer"]
    if names is None:
        raise CheckpointError(
            f"{checkpoint.path}: cannot be converted: it was written at ZeRO stage 0 by an older version; train to its "
            "next checkpoint at stage 0 first"
        )
    for number, name in enumerate(names):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        state = optimizer["state"][number]
        for file, tensor in (("fp32", model["module"][name]), *((key, state[key]) for key in MOMENTS)):
            torch.save({"param": tensor.clone()}, folder / f"{file}.pt")
        torch.save(state["step"].clone(), folder / "step.pt")
    groups = [{**group, "params": [number]} for number, group in enumerate(optimizer["param_groups"])]
    torch.save({"param_groups": groups, "ds_version": model["ds_version"]}, target / "zero" / "optimizer_state.pt")
    torch.save(model | {"optimizer": None}, target / WHOLE)


def load_whole(engine: Any, converted: Path) -> None:
    """Load a converted checkpoint into an engine of ZeRO stage 0; frozen weights stay as they are."""
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            folder = converted / STATES / "zero" / engine.param_names[parameter]
            parameter.data.copy_(torch.load(folder / "fp32.pt")["param"].view(parameter.shape))
            moments = {key: torch.load(folder / f"{key}.pt")["param"].view(parameter.shape) for key in MOMENTS}
            step = torch.as_tensor(torch.load(folder / "step.pt", weights_only=False), dtype=torch.float32)
            engine.optimizer.state[parameter] = {
                "step": step.cpu().clone(),
                **{key: tensor.to(parameter.device) for key, tensor in moments.items()},
            }


def _bridge(states: Path) -> None:
    """Add the files that the loaders of the other ZeRO stages need, which DeepSpeed's converter does not write.

    Stages 1 and 2 store the weights whole in one file and a step count with each parameter. Stage 3 stores no weights
    there, and the step counts with the optimizer.
    """
    path = states / "zero" / "optimizer_state.pt"
    optimizer = torch.load(path, weights_only=False)  # `find_damage` checked its origin
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
