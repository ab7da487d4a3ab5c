"""What two ranks that share packs do when one of them reads another copy of the shards."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from molmo2.config import load_recipe
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import make_mesh
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from molmo2.training.run import Run, TrainingError, agree_on_masked
from shards.layout import Expanded
from shards.stream import collate
from shards.stream.collate import Batch
from shards.stream.loader import make_loader
from shards.stream.plan import Cursor, open_plan


def run_of(root: str) -> Run:
    """A run of two ranks that share packs, each with a copy of the shards of its own."""
    os.environ["MOLMO2_DATA"] = f"{root}/{dist.get_rank()}"
    recipe = load_recipe(Path(root) / "r.yaml", ["train.sp=2"])
    tokenizer = f"{os.environ['MOLMO2_DATA']}/raw/tokenizer"
    processor = build_processor(ProcessorSettings(preset="tiny", tokenizer_dir=tokenizer, stage="sft"))
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings, processor.settings)
    return Run(
        recipe=recipe,
        mesh=make_mesh(2),
        device=torch.device("cpu"),
        model_config=PRESETS["tiny"],
        plan=plan,
        layout=processor.layout,
        tokenizer=processor.tokenizer,
    )


def own_batches(run: Run) -> Iterator[Batch]:
    return make_loader(run.plan, Cursor(), run.layout, sp_size=run.mesh.sp, sp_rank=run.mesh.sp_rank)


def read_step(root: str) -> list[dict[str, Any]]:
    """The first step's packs as this rank holds them before and after the ranks have agreed."""
    run, found = run_of(root), []
    batches = own_batches(run)
    for _ in range(run.recipe.train.packs_per_step):
        read = next(batches)
        agreed = agree_on_masked(run, read, Cursor())
        tensors = {name: getattr(agreed, name) for name in ("input_ids", "loss_weights", "segment_ids", "visual_crops")}
        masked = [each.row for each in agreed.masked]
        found.append(
            {
                "read": [each.row for each in read.masked],
                "masked": masked,
                "tensors": tensors,
                "pixels": len(agreed.pixels),
            }
        )
    return found


def read_reordered(root: str) -> str | None:
    """What the ranks are told if rank 1's shards hold the same labels in another order, whole and with no damage."""
    if dist.get_rank():
        expand = collate.expand

        def reordered(*arguments: Any) -> Expanded:
            tokens = expand(*arguments)
            labels, places = tokens.labels.copy(), tokens.weights > 0
            labels[places] = labels[places][::-1]
            return replace(tokens, labels=labels)

        collate.expand = reordered
    run = run_of(root)
    try:
        agree_on_masked(run, next(own_batches(run)), Cursor())
    except TrainingError as error:
        return str(error)
    return None
