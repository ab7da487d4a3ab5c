"""What two ranks that share packs do when one of them reads a damaged copy of the shards."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from molmo2.config import load_recipe
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import make_mesh
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from molmo2.training.run import Run, agree_on_masked
from shards.stream.loader import make_loader
from shards.stream.plan import Cursor, open_plan


def read_step(root: str) -> list[dict[str, Any]]:
    """The first step's packs as this rank holds them before and after the ranks have agreed."""
    os.environ["MOLMO2_DATA"] = f"{root}/{dist.get_rank()}"
    recipe = load_recipe(Path(root) / "r.yaml", ["train.sp=2"])
    tokenizer = f"{os.environ['MOLMO2_DATA']}/raw/tokenizer"
    processor = build_processor(ProcessorSettings(preset="tiny", tokenizer_dir=tokenizer, stage="sft"))
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings, processor.settings)
    run = Run(
        recipe=recipe,
        mesh=make_mesh(2),
        device=torch.device("cpu"),
        model_config=PRESETS["tiny"],
        plan=plan,
        layout=processor.layout,
        tokenizer=processor.tokenizer,
    )
    place = {name: getattr(run.mesh, name) for name in ("dp_rank", "sp_rank")}
    batches, found = make_loader(plan, Cursor(), run.layout, dp_size=run.mesh.dp, sp_size=2, **place), []
    for _ in range(recipe.train.packs_per_step):
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
