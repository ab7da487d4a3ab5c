"""The page of a run, from a run's files; that training writes it: test_train."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molmo2.config import Recipe, load_recipe
from molmo2.training.report import write_report

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo/stage1.yaml"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    recipe = load_recipe(DEMO, ["train.steps=1000"])
    recipe.run_dir.mkdir(parents=True)
    return recipe


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_holds_all_that_a_run_has(recipe: Recipe) -> None:
    run = recipe.run_dir
    log = [
        {
            "step": step,
            "loss": None if step == 3 else 9.0 - step / 1000,
            "loss.toy": 2.5,
            "lr.vit": 1e-6 * step,
            "grad_norm.llm": 0.5,
            "tokens": 1000,
            "tokens.toy": 900,
            "tokens.<odd>": 100,
            "tokens_per_second": 5e4,
            "data_wait": 0.01,
            "seconds": 3.6,
        }
        for step in range(1, 501)
    ]
    write_lines(run / "log.jsonl", log)
    write_lines(run / "eval.jsonl", [{"step": 0, "loss": 3.0}, {"step": 500, "loss": 2.0}])
    share = {"epochs": 1.5, "masked": 2}
    datasets = {"toy": {"asked": 0.75, "drawn": 0.751, **share}, "<odd>": {"asked": 0.25, "drawn": 0.249, **share}}
    write_lines(run / "data.jsonl", [{"step": 500, "windows": 1, "datasets": datasets}])
    folder = run / "samples/step-00000500"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.jpg")
    sample = {"dataset": "toy", "key": "k", "prompt": "<b>?", "answer": "<script>", "expected": "yes", "picture": None}
    (folder / "samples.json").write_text(json.dumps([sample | {"picture": "0.jpg"}, sample]))
    checkpoint = run / "checkpoints/step-00000500"
    checkpoint.mkdir(parents=True)
    meta = {"world": 8, "sp": 2, "versions": {"torch": "2.9"}, "commit": "abc123"}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    page = write_report(recipe).read_text()
    for expected in (
        *("500 of 1,000", "500,000 in 0.50 hours", "8, 2 to a pack", "torch 2.9", "abc123"),
        *('"loss by step"', '"loss.toy by step"', '"lr.vit by step"', '"grad_norm.llm by step"'),
        "3.0000 at step 0, 2.0000 at step 500",
        *('"tokens_per_second by step"', '"data_wait by step"', '"held-out loss by step"'),
        *("75.1%", "90.0%", "1.50", "&lt;odd&gt;", "&lt;script&gt;", "data:image/jpeg;base64,", f"name: {recipe.name}"),
    ):
        assert expected in page, expected
    assert "<script>" not in page and "<odd>" not in page and "tokens.toy by step" not in page
    assert page.count("<img") == 1


def test_a_run_without_anything_has_a_page(recipe: Recipe) -> None:
    page = write_report(recipe).read_text()
    assert "0 of 1,000" in page and "<svg" not in page and "Latest samples" not in page
    assert not list(recipe.run_dir.glob("*.tmp"))
