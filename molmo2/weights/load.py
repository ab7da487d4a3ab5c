"""Load a model from any source: a run of this project, a released or exported directory, or the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from molmo2.checkpoint.files import RECIPE
from molmo2.checkpoint.lookup import load_weights, open_checkpoint
from molmo2.config import data_path
from molmo2.model.presets import ModelConfig
from molmo2.weights.config_types import CONFIG
from molmo2.weights.pretrained import PretrainedError, load_released, locate
from shards.catalog.nearest import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model's configuration, its float32 weights by our names, and their origin.

    Attributes:
        path: the checkpoint or the directory.
        tokenizer_dir: the tokenizer with which the model was trained.
        origin: JSON: run, stage, step, finished and commit; or the released name and its directory.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    path: Path
    tokenizer_dir: Path
    origin: dict[str, Any]


def open_model(name: str) -> OpenedModel:
    """Load a run or checkpoint of this project (name or path), a directory with `config.json`, or a model on the hub.

    A model on the hub is named OWNER/NAME or OWNER/NAME@REVISION.

    Models on this machine have precedence. The URL of a run's mirror, s3://…/<run>, is accepted as a path.

    Raises:
        CheckpointError: a checkpoint of this project is damaged.
        PretrainedError: no model has this name.
        ForeignConfigError: the directory holds another kind of model.
        WeightsError: its tensors are not those of the model.
    """
    if is_run(name):
        return _open_run(name)
    directory = locate(name)
    config, weights = load_released(directory)
    origin = {"model": name, "directory": str(directory)}
    return OpenedModel(config=config, weights=weights, path=directory, tokenizer_dir=directory, origin=origin)


def is_run(name: str) -> bool:
    """Whether a name means a run or checkpoint of this project, and not a model with `config.json`, here or on the hub.

    Raises:
        PretrainedError: nothing has this name.
    """
    if any((path / CONFIG).exists() for path in (Path(name), data_path(name))):
        return False
    if "://" in name or any(path.exists() for path in (Path(name), data_path("runs") / name)):
        return True
    if "/" not in name:
        runs = data_path("runs")
        hint = did_you_mean(name, (path.name for path in runs.glob("*")))
        raise PretrainedError(f"{name}: no run in {runs}, no directory, and no OWNER/NAME of the hub. {hint}".strip())
    return False


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
