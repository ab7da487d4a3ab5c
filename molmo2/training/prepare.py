"""From a recipe to a run: everything is checked that can be before the model is built. Ranks are formed elsewhere."""

from __future__ import annotations

import importlib.util

import torch

from molmo2.config import Recipe, data_path
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import Mesh
from molmo2.processing.contract import ProcessorSettings, read_contract
from molmo2.training.run import Run
from shards.stream.plan import open_plan


def prepare(recipe: Recipe, mesh: Mesh, device: torch.device) -> Run:
    """Check everything that can be checked before the model is built: tokenizer, shards, processor."""
    settings = {"logging.wandb": recipe.logging.wandb, "optim.lora": recipe.optim.lora, "train.fp8": recipe.train.fp8}
    for (name, value), package in zip(settings.items(), ("wandb", "peft", "torchao"), strict=True):
        if value and not importlib.util.find_spec(package):
            raise ValueError(f"{name} is set, but {package} is not installed; pip install {package}, or take it out")
    tokenizer = str(data_path(recipe.tokenizer))
    contract = read_contract(ProcessorSettings(preset=recipe.model, tokenizer_dir=tokenizer, stage=recipe.stage))
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings, contract.settings)
    held_out = None
    if recipe.eval is not None:
        from molmo2.training.validation import open_held_out

        held_out = open_held_out(recipe, recipe.eval, contract.settings)
    return Run(
        recipe=recipe,
        mesh=mesh,
        device=device,
        model_config=PRESETS[recipe.model],
        plan=plan,
        layout=contract.layout,
        tokenizer=contract.tokenizer,
        held_out=held_out,
    )
