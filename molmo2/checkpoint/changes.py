"""What may change between a checkpoint and the run that resumes it: ranks, ZeRO stage and, if asked for, the data.

What is trained may not. Ranks, stage and parameters are checked before the engine is built. The conversion for other
ranks is in `molmo2.checkpoint.reshard`.
"""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from molmo2.checkpoint.files import RECIPE, Checkpoint, CheckpointError
from molmo2.config import Recipe
from molmo2.parallel.agree import say
from molmo2.training.run import CHANGES_NAME, Run
from shards.atomic import append_to
from shards.stream.plan import Cursor


def check_first_weights(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse a `--checkpoint` that a run would not read, since it has begun from other weights and only resumes.

    Raises:
        CheckpointError: the run has begun from other weights than the recipe's `init`.
    """
    began, wanted = checkpoint.read(RECIPE)["init"], json.loads(recipe.model_dump_json())["init"]
    if began != wanted:
        raise CheckpointError(
            f"--checkpoint {wanted!r}: the run is at step {checkpoint.step} and began from {began!r}; leave "
            "--checkpoint out to resume, or begin another run with --set name=NAME"
        )


def mesh_changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Differences between the ranks that wrote a checkpoint and those that run now, as "world was 2, is 1".

    Raises:
        CheckpointError: a difference for which the checkpoint cannot be converted.
    """
    train = recipe.train
    now = {"world": dist.get_world_size(), "zero_stage": train.zero_stage, "precision": train.precision}
    changed = {name: (checkpoint.meta[name], value) for name, value in now.items() if checkpoint.meta[name] != value}
    differing = [f"{name} was {was}, is {value}" for name, (was, value) in changed.items()]
    if "precision" in changed:
        raise CheckpointError(
            f"{checkpoint.path}: cannot continue: {', '.join(differing)}; start it as it was, or begin a new run with "
            f"`init: {checkpoint.path}`"
        )
    return [] if train.zero_stage == checkpoint.meta["zero_stage"] == 0 else differing


def check_trained_parameters(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Check that a checkpoint has optimizer states for exactly the parameters that the recipe trains.

    Raises:
        CheckpointError: other parameters were trained; every setting that differs is named.
    """
    old, optim = checkpoint.read(RECIPE), recipe.optim
    lora = old["optim"].get("lora")
    settings = {
        "train.freeze": (sorted(old["train"].get("freeze", ())), sorted(recipe.train.freeze)),
        "optim.freeze_base_embedding": (old["optim"]["freeze_base_embedding"], optim.freeze_base_embedding),
        "optim.lora.rank": (lora and lora["rank"], optim.lora and optim.lora.rank),
    }
    differing = [f"{name} was {was}, is {value}" for name, (was, value) in settings.items() if was != value]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: cannot continue: {', '.join(differing)}: other parameters would be trained than those "
            "with optimizer states; restore the setting, or begin a new run (another name) with "
            f"`init: {checkpoint.path}`"
        )


def take_over(run: Run, state: dict[str, Any]) -> Cursor:
    """Continue with this recipe's data after another plan's; the change is recorded in `data_changes.jsonl`."""
    cursor, changed = run.plan.change_over(state)
    if changed and run.mesh.rank == 0:
        line = {"step": cursor.step, "cursor": cursor._asdict(), "changed": changed}
        with append_to(run.recipe.run_dir / CHANGES_NAME) as file:
            file.write(json.dumps(line) + "\n")
        say(f"{run.recipe.name}: after step {cursor.step} the data change on purpose: {'; '.join(changed)}")
    return cursor


def recipe_changes(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Settings that differ from the recipe in a checkpoint, as "train.steps 10 -> 20"."""
    old, new = (_flat(value) for value in (checkpoint.read(RECIPE), json.loads(recipe.model_dump_json())))
    return [
        f"{name} {old.get(name)} -> {new.get(name)}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat
