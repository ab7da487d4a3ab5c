"""What --dry-run and the preview say about ranks that wait for each other."""

from pathlib import Path

import pytest

from molmo2.config import Recipe, load_recipe
from molmo2.inspection.balance import balance_lines
from molmo2.model.presets import PRESETS
from molmo2.training.cost import pack_cost
from shards.stream.balance import PackCost
from shards.stream.plan import PackSizes

STAGE2 = Path(__file__).resolve().parents[3] / "recipes/stage2.yaml"
VIDEO, TEXT = PackSizes(tokens=1000, crops=3, pairs=0.0), PackSizes(tokens=1000, crops=1, pairs=0.0)


@pytest.fixture
def recipe() -> Recipe:
    """Its packs cost as many units as they have crops."""
    settings = ["packs_per_step=8", "micro_batch=1", "sp=1", "pack_cost={token: 0, crop: 1, pair: 0}"]
    return load_recipe(STAGE2, [f"train.{setting}" for setting in settings])


def test_shares_and_what_would_change_them(recipe: Recipe) -> None:
    """Two videos and six texts: on 8 ranks all wait for the videos, with 16 packs a step only once of two times."""
    lines = balance_lines(recipe, [[VIDEO, TEXT, TEXT, TEXT] * 2] * 8, (2, 4, 8, 3))
    assert lines[0].startswith("the dearest pack costs 2.00 times the mean")
    rows = {row.split()[0]: row.split()[1:] for row in lines[3:6]}
    assert rows["2"] == ["2", "4", "100.0%", "75.0%"]  # undealt: 3 + 1, 1 + 1, … on both ranks
    assert rows["4"] == ["4", "2", "75.0%", "50.0%"]
    assert rows["8"] == ["8", "1", "50.0%", "50.0%"]
    assert lines[6] == "what would change that for 8 ranks:"
    assert [line.split() for line in lines[7:]] == [
        ["train.packs_per_step=16:", "75.0%"],
        ["train.packs_per_step=32:", "100.0%"],
        ["train.packs_per_step=64:", "100.0%"],
        ["train.sp=2:", "75.0%"],
        ["train.sp=4:", "100.0%"],
        ["train.sp=8:", "100.0%"],
    ]


def test_ranks_that_do_not_divide_the_packs_are_told(recipe: Recipe) -> None:
    assert "none of 3, 5 ranks divides the packs of a step" in balance_lines(recipe, [[VIDEO] * 8], (3, 5))[-1]


def test_without_measured_costs_operations_count(recipe: Recipe) -> None:
    assert pack_cost(recipe, PRESETS["4b"]) == PackCost(token=0, crop=1, pair=0)
    plain = load_recipe(STAGE2)
    cost = pack_cost(plain, PRESETS["4b"])
    assert min(cost) > 0
    assert pack_cost(load_recipe(STAGE2, ["train.recompute=none"]), PRESETS["4b"]).crop < cost.crop
    assert pack_cost(load_recipe(STAGE2, ["train.freeze=[vit]"]), PRESETS["4b"]).crop < cost.crop / 2
