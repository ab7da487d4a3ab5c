"""`tools/new_dataset.py` and the pages that show it: from a folder of pictures to a catalog, a recipe and a page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from catalog_cases import image
from fork_server import python

from molmo2.config import load_recipe
from shards.catalog import load_catalog
from shards.convert.layout_columns import UnsureError
from tools import new_dataset

ROOT = Path(__file__).resolve().parents[2]


def photos(folder: Path, number: int = 12) -> Path:
    """Pictures beside .txt files."""
    folder.mkdir()
    for n in range(number):
        (folder / f"{n}.png").write_bytes(image(f"{60 + n}x40:red"))
        (folder / f"{n}.txt").write_text(f"Picture {n} is red.\n")
    return folder


def run_tool(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(folder / "data"))
    monkeypatch.setattr(sys, "argv", ["new_dataset.py", *arguments, "--out", str(folder)])
    new_dataset.main()


@pytest.mark.parametrize(
    ("arguments", "model", "lora"),
    [((), "tiny", False), (("--gpu-memory", "24"), "4b", True), (("--gpu-memory", "141"), "4b", False)],
)
def test_the_recipe_fits_the_machine_and_the_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    model: str,
    lora: bool,
) -> None:
    monkeypatch.setattr(new_dataset, "gpu_memories", list)
    run_tool(monkeypatch, tmp_path, str(photos(tmp_path / "photos")), "--name", "mine", *arguments)
    catalog, recipe = load_catalog(str(tmp_path / "mine.yaml")), load_recipe(tmp_path / "mine-recipe.yaml")
    (row,) = catalog.require("eval")
    assert (row.name, row.converter, catalog.preset) == ("mine", "image_caption", model) and row.held_out >= 0.02
    assert recipe.model == model and (recipe.optim.lora is not None) == lora
    assert recipe.train.steps == 30 and recipe.optim.llm.warmup_steps == 3
    assert recipe.eval is not None and recipe.eval.datasets == ("mine",)
    assert recipe.data.sequence_length == catalog.stages["sft"].limits.sequence_length
    printed = capsys.readouterr().out
    tools = re.findall(r"python (\S+\.py)|deepspeed (\S+\.py)", printed)
    wanted = ["make_tokenizer"] * (model == "4b") + ["build_shards", "build_shards", "inspect_shards", "train"]
    assert [Path("".join(names)).stem for names in tools] == wanted


def test_what_is_not_sure_is_asked_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path / "photos")
    rows = [f'{{"image": "{n}.png", "label": "cross", "points": [[30, 20]]}}' for n in range(12)]
    (folder / "points.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(new_dataset, "gpu_memories", list)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UnsureError, match="--choose scale=percent"):
        run_tool(monkeypatch, tmp_path, str(folder), "--name", "mine")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    typed = iter(["metres", "pixel"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    run_tool(monkeypatch, tmp_path, str(folder), "--name", "mine")
    (row,) = load_catalog(str(tmp_path / "mine.yaml")).require("sft")
    assert row.options["scale"] == "pixel"
    run_tool(monkeypatch, tmp_path, str(folder), "--name", "mine", "--choose", "scale=thousand")
    assert load_catalog(str(tmp_path / "mine.yaml")).rows[0].options["scale"] == "thousand"


@pytest.mark.slow
def test_go_builds_both_stages_and_writes_the_page(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    command = [python(), str(ROOT / "tools/new_dataset.py"), "photos", "--name", "mine", "--model", "tiny", "--go"]
    environment = {"MOLMO2_DATA": str(tmp_path / "data"), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Picture" in (tmp_path / "mine.html").read_text()
    assert all((tmp_path / f"data/shards/{stage}/mine/index.json").exists() for stage in ("sft", "eval"))


def test_a_table_that_is_not_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    rows = [{"instruction": "Count.", "input": str(n), "output": f"{n}."} for n in range(9)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "sizes.csv").write_text("colour,size\nred,3\n")
    run_tool(monkeypatch, tmp_path, str(folder), "--name", "mine", "--model", "tiny")
    printed = capsys.readouterr().out
    assert "mine-alpaca: instructions (Alpaca), " in printed
    assert (
        "not used, because its layout is not known: columns of given/sizes.csv: colour, size; docs/own-data" in printed
    )
