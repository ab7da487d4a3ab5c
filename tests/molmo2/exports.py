"""Models with noise in all weights, their exports, and a checkpoint to export, for tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fork_server import python
from processing_cases import tokenizer_dir
from safetensors.torch import save_file
from tiny_models import QWEN, noisy_model
from torch import Tensor

from molmo2.checkpoint.files import FORMAT, META, MODEL, PLAN, RECIPE, WEIGHTS, file_hash
from molmo2.export import model as export
from molmo2.export.card import About
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig

ORIGIN = {"run": "test", "step": 3}


ABOUT = About(origin=ORIGIN)


def noisy(config: ModelConfig) -> Molmo2:
    """Random weights, norms and biases included, large enough for lively answers."""
    return noisy_model(config, seed=1)


def weights_of(model: Molmo2) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def exported(model: Molmo2, out: Path) -> Path:
    export.export_model(model.config, weights_of(model), tokenizer_dir(), out, ABOUT)
    return out


def reload(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(directory).eval(), AutoProcessor.from_pretrained(directory)


def run_tool(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [python(), root / "tools/export_model.py", *map(str, arguments)]
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=variables)


def write_checkpoint(run: Path, tokenizer: str) -> Path:
    """The last checkpoint of a run, as the trainer leaves it."""
    step = run / "checkpoints" / "step-00000003"
    step.mkdir(parents=True)
    save_file(weights_of(noisy(QWEN)), str(step / WEIGHTS))
    plan = {"identity": {"weights": {"pixmo-cap": 3 * 2**30, "in-house": 2**30}}}
    recipe = {"name": "run", "init": "stage1", "tokenizer": tokenizer, "train": {"steps": 3, "precision": "bf16"}}
    for name, value in {MODEL: QWEN.to_json(), RECIPE: recipe, PLAN: plan}.items():
        (step / name).write_text(json.dumps(value))
    files = {path.name: [path.stat().st_size, file_hash(path)] for path in step.iterdir()}
    meta = {"format": FORMAT, "run": "run", "stage": "sft", "step": 3, "finished": True, "commit": None}
    (step / META).write_text(json.dumps({**meta, "files": files}))
    return step
