"""The model card of an export: recipe, data with shares and licences, results. The text is in `model_card.md.jinja`.

Everything is read from the checkpoint and the files of its run; the card says what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from molmo2.checkpoint.files import PLAN, RECIPE, Checkpoint
from molmo2.export.check import FPS, ExportError
from molmo2.model.presets import ModelConfig
from molmo2.pages import fill_template
from shards.catalog import load_catalog
from shards.stream.mixture import SCALE

NUM_FRAMES = 384  # maximum frames of a video, for the card and the exported processor
CATALOGS = ("molmo2", "demo")  # catalogs with the sources and licences of datasets
ORIGIN = ("run", "stage", "step", "finished", "commit")  # entries of a checkpoint's `meta.json` for the card


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """The origin of weights.

    Attributes:
        origin: JSON; run, step and so on.
        recipe: the resolved recipe; None if there is none.
        shares: dataset -> share of the samples, 0 to 1.
        evaluations: the results of `tools/evaluate.py` for these weights.
    """

    origin: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()


def about_checkpoint(checkpoint: Checkpoint) -> About:
    """The origin of a checkpoint's weights, and the evaluations of them in its run's directory.

    Raises:
        ExportError: an evaluation's file cannot be read.
    """
    weights = checkpoint.read(PLAN).get("identity", {}).get("weights", {})
    return About(
        origin={name: checkpoint.meta[name] for name in ORIGIN},
        recipe=checkpoint.read(RECIPE),
        shares={name: weight / SCALE for name, weight in weights.items()},
        evaluations=_evaluations(checkpoint),
    )


def _evaluations(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The evaluations of this checkpoint's step; the run's directory may have some of other steps."""
    evaluations = []
    for path in sorted(checkpoint.path.parent.parent.glob("evaluation-*.json")):
        try:
            document = json.loads(path.read_text())
            step, results = document["step"], document["results"]
            complete = all({"name", "dataset", "metric", "num_questions", "score", "chance"} <= set(r) for r in results)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{path}: no readable evaluation ({error!r}); evaluate again or remove it") from None
        if not complete:
            raise ExportError(f"{path}: an evaluation without scores; evaluate again or remove it")
        if step == checkpoint.step:
            evaluations.append(document)
    return evaluations


def _sources() -> dict[str, dict[str, str]]:
    """Source and licence of every dataset in the catalogs that come with this project."""
    return {row.name: row.source for name in CATALOGS for row in load_catalog(name).rows}


def _data(shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of the card's table of data, the largest share first."""
    sources = _sources() if shares else {}
    rows = []
    for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        source = sources.get(name, {})
        rows.append({"name": name, "share": share, "source": source.get("repo"), "licence": source.get("licence")})
    return rows


def _init(recipe: Mapping[str, Any]) -> str:
    """The initial weights of a run, as text; "" for random ones."""
    init = recipe.get("init") or ""
    named = {"": init} if isinstance(init, str) else init
    return ", ".join(f"{kind} `{name}`".strip() for kind, name in named.items() if name)


def _hyperparameters(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The most important settings of a recipe; the whole recipe is at the end of the card."""
    data, train, optim = recipe.get("data", {}), recipe.get("train", {}), recipe.get("optim", {})
    values = {
        "started from": _init(recipe),
        "steps": train.get("steps"),
        "packs per step": train.get("packs_per_step"),
        "sequence length": data.get("sequence_length"),
        "precision": train.get("precision"),
        "learning rates": ", ".join(f"{name} {optim[name]['lr']:g}" for name in ("vit", "connector", "llm") if optim),
    }
    return {name: value for name, value in values.items() if value not in (None, "")}


def model_card(
    config: ModelConfig, num_parameters: int, about: About, differences: Mapping[str, float], *, code: str
) -> str:
    """The exported directory's README; `code` is what lies beside the weights: "", "release" or "vllm"."""
    data = _data(about.shares)
    repos = {row["source"] for row in data if row["source"]}
    values = {
        "name": config.name,
        "num_parameters": num_parameters,
        "about": about,
        "data": data,
        "hub_datasets": sorted(repo for repo in repos if re.fullmatch(r"[\w.-]+/[\w.-]+", repo)),
        "hyperparameters": _hyperparameters(about.recipe or {}),
        "init": _init(about.recipe or {}),
        "recipe": yaml.safe_dump(dict(about.recipe), sort_keys=False).rstrip() if about.recipe else "",
        "differences": differences,
        "fps": FPS,
        "num_frames": NUM_FRAMES,
        "thin_side": 2 * config.overlap_margin * config.patch_size,
        "code": code,
    }
    return fill_template("export/model_card.md.jinja", **values)
