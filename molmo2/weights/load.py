"""A model to use, wherever it comes from: one of our runs, a directory that was released or exported, or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from molmo2.checkpoint.files import RECIPE
from molmo2.checkpoint.open import load_weights, open_checkpoint
from molmo2.config import data_path
from molmo2.model.presets import ModelConfig
from molmo2.weights.config_json import CONFIG
from molmo2.weights.pretrained import PretrainedError, load_released, locate


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """Configuration and float32 weights by our names, and what belongs to them.

    Attributes:
        path: the checkpoint or the directory.
        tokenizer_dir: the tokenizer that it was trained with.
        origin: JSON: run, stage, step, whether finished, commit; or the released name and its directory.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    path: Path
    tokenizer_dir: Path
    origin: dict[str, Any]


def open_model(name: str) -> OpenedModel:
    """Load a run or checkpoint of ours (name or path), a directory with `config.json`, or OWNER/NAME[@REVISION].

    What lies on this machine goes before the hub. The mirror of a run, s3://…/<run>, is a path too.

    Raises:
        CheckpointError: a checkpoint of ours that is damaged.
        PretrainedError: there is nothing of that name.
        ForeignConfigError: the directory holds another kind of model.
        WeightsError: its tensors are not those of the model.
    """
    if not any((path / CONFIG).exists() for path in (Path(name), data_path(name))):
        if "://" in name or any(path.exists() for path in (Path(name), data_path("runs") / name)):
            return _open_run(name)
        if "/" not in name:
            raise PretrainedError(f"{name}: no run in {data_path('runs')}, no directory, and no OWNER/NAME of the hub")
    directory = locate(name)
    config, weights = load_released(directory)
    origin = {"model": name, "directory": str(directory)}
    return OpenedModel(config=config, weights=weights, path=directory, tokenizer_dir=directory, origin=origin)


def _open_run(name: str) -> OpenedModel:
    checkpoint = open_checkpoint(name)
    config, weights, meta = load_weights(checkpoint.path)
    return OpenedModel(
        config=config,
        weights=weights,
        path=checkpoint.path,
        tokenizer_dir=data_path(checkpoint.read(RECIPE)["tokenizer"]),
        origin={key: meta[key] for key in ("run", "stage", "step", "finished", "commit")},
    )
