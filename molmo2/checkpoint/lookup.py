"""Open a checkpoint by name, path or URL, and load its weights. `molmo2.weights.load` loads other formats too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from molmo2.checkpoint.files import (
    META,
    MODEL,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    checkpoints_dir,
    consolidate,
    find_damage,
    find_newest,
)
from molmo2.checkpoint.mirror import cached
from molmo2.config import data_path
from molmo2.model.presets import ModelConfig


def open_checkpoint(name: str | Path, say: Callable[[str], None] = print) -> Checkpoint:
    """Open a checkpoint by its own path, or the newest whole one of a run by the run's path or name.

    The URL of a run's mirror, s3://…/<run>, is accepted too: its newest copy is downloaded into the cache.

    Raises:
        CheckpointError: there is no whole checkpoint, or the named one is damaged.
    """
    if "://" in str(name):
        name = cached(str(name), say)
    for path in (Path(name), data_path("runs") / name):
        if (path / META).exists() or (path.name.startswith("step-") and path.is_dir()):
            wrong = find_damage(path)
            if wrong:
                raise CheckpointError(f"{path}: {wrong}; name another checkpoint of the run")
            return Checkpoint(path, json.loads((path / META).read_text()))
        newest = find_newest(checkpoints_dir(path), say)
        if newest:
            return newest
    raise CheckpointError(
        f"{name}: no whole checkpoint here or in {data_path('runs') / name}; train that run first, or give the path"
    )


def load_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """The model's configuration, its float32 weights by name, and `meta.json`, for export and evaluation.

    Args:
        path: as for `open_checkpoint`.

    Raises:
        CheckpointError: there is no whole checkpoint.
    """
    checkpoint = open_checkpoint(path)
    weights = checkpoint.path / WEIGHTS
    if weights.exists():
        state = load_file(str(weights))
    else:
        state = {name: read() for name, read in consolidate(checkpoint.path).items()}
    return ModelConfig.from_json(checkpoint.read(MODEL)), state, checkpoint.meta
