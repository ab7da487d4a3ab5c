"""Doubtful settings are named before the first step, and the project's own recipes have none."""

from pathlib import Path

import numpy as np
import pytest
from toy import write_lengths

from molmo2.config import Recipe, load_recipe
from molmo2.training.recipe_warnings import recipe_warnings
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Plan

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
DEMO = RECIPES / "demo/stage1.yaml"
MIXTURE = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"toy": None}}}})


def plan_of(recipe: Recipe, folder: Path, tokens: int, crops: int) -> Plan:
    """A plan over 100 samples of one size."""
    sizes = [np.full((100, 3), size) for size in (tokens, crops)]
    return Plan([write_lengths(folder, "toy", *sizes, num_shards=1)], MIXTURE, recipe.plan_settings)


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("**/stage*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_recipes_of_the_project_have_none(path: Path) -> None:
    assert recipe_warnings(load_recipe(path), None) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=30"], "the warm-up of optim.vit, optim.connector, optim.llm takes 20 of 30 steps"),
        (["optim.llm.warmup_fraction=0.5", "train.steps=400"], "the warm-up of optim.llm takes 200 of 400 steps"),
        (["optim.freeze_base_embedding=true"], "the embedding of the base vocabulary is random"),
        (["train.freeze=[vit]"], "train.freeze freezes the weights of the vit, which are random"),
        (["optim.lora.rank=8"], "optim.lora freezes the weights of the llm, which are random"),
        (
            ["init={llm: a/b, vit: c/d}", "train.freeze=[connector]"],
            "train.freeze freezes the weights of the connector",
        ),
        (["train.precision=bf16", "train.zero_stage=2"], "train.precision bf16 saves no time on a CPU"),
    ],
)
def test_a_doubtful_setting_is_named(overrides: list[str], expected: str) -> None:
    lines = recipe_warnings(load_recipe(DEMO, overrides), None, "cpu")
    assert any(line.startswith(f"demo-stage1: WARNING: {expected}") or expected in line for line in lines), lines


def test_settings_that_fit_are_not_named() -> None:
    bf16 = ["train.precision=bf16", "train.zero_stage=2"]
    assert recipe_warnings(load_recipe(DEMO, bf16), None, "cuda") == []
    assert recipe_warnings(load_recipe(DEMO, ["train.freeze=[vit]", "init={molmo2: a/b}"]), None, "cpu") == []
    frozen = ["train.freeze=[vit]", "optim.vit.warmup_steps=4000"]
    assert not any("warm-up" in line for line in recipe_warnings(load_recipe(DEMO, frozen), None))


def test_packs_with_much_padding_are_named_with_the_limit_that_does_it(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, ["data.sequence_length=1000", "data.max_crops=10", "data.window=200"])
    # Five samples have 10 crops and 500 tokens.
    (line,) = recipe_warnings(recipe, plan_of(recipe, tmp_path / "crops", 100, 2))
    assert "packs hold 50% of the tokens" in line and "data.max_crops 10 is reached first (100% full)" in line
    # One sample has more than half of the tokens, so no second one fits.
    (line,) = recipe_warnings(recipe, plan_of(recipe, tmp_path / "tokens", 550, 2))
    assert "packs hold 55% of the tokens" in line and "few samples fit beside each other in 1,000 tokens" in line
    assert recipe_warnings(recipe, plan_of(recipe, tmp_path / "full", 200, 2)) == []
