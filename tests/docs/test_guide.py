"""docs/guide.md, last section: it has each command of the original guide, and the commands of today run in order.

The hub, the data and the model are small. Afterwards commands of other pages run on the same data and models.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_run
import yaml
from catalog_cases import image, video
from fake_hub import environment, fake_hub
from page_commands import RUN_AFTER_GUIDE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/guide.md").read_text(encoding="utf-8").partition("## 9. ")[2]
ORIGINAL = (ROOT / "tests/docs/original_guide.txt").read_text(encoding="utf-8").splitlines()
NO_COMMAND = "-"  # stands for a step that the original guide did not have
LIMITS = {"sequence_length": 512, "max_crops": 16, "max_frames": 6, "image_crops": 2}
COLOURS = ["red", "green", "blue", "white", "grey", "pink"]


class Line(NamedTuple):
    """A row of the page's tables: the original command, that of today, and why the latter is not run here or ""."""

    original: str
    today: str
    reason: str


def lines() -> list[Line]:
    rows = [line.strip("|").split("|") for line in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
    assert all(len(row) == 3 for row in rows)
    return [Line(row[0].strip(" `"), row[1].strip(" `"), row[2].strip()) for row in rows if row[1].startswith(" `")]


def commands() -> list[str]:
    """What is run, each command once, and the settings together in one dry run."""
    listed = [line.today for line in lines() if not line.reason]
    settings = [command.removeprefix("--set ") for command in listed if command.startswith("--set ")]
    dry_run = f"python molmo2/train.py --recipe recipes/stage2.yaml --set {' '.join(settings)} --dry-run"
    return [*dict.fromkeys(command for command in listed if not command.startswith("--set ")), dry_run]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target.getvalue()


def publish(hub: Path) -> None:
    """Four small datasets, in layouts of our own."""
    pictures = [{"bytes": image(f"60x40:{colour}"), "path": None} for colour in COLOURS]
    pixmo = [{"image": picture, "caption": f"A {name} field."} for picture, name in zip(pictures, COLOURS, strict=True)]
    chart = [
        {"image": picture, "query": "What colour?", "label": [name]}
        for picture, name in zip(pictures, COLOURS, strict=True)
    ]
    clips = [
        {"video": "videos/1.mp4", "question": f"Is it {name}?", "answer": "It grows brighter."} for name in COLOURS
    ]
    files = {
        "pixmo-cap/data/train.parquet": parquet(pixmo),
        "molmo2-cap/data/train.parquet": parquet(pixmo),
        "molmo2-video-cap-qa/data/train.parquet": parquet(clips),
        "molmo2-video-cap-qa/videos/1.mp4": video("64x48:30:10"),
        "chart-qa/data/val.parquet": parquet(chart),
    }
    for name, data in files.items():
        path = hub / "datasets/owner" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def catalog() -> dict[str, Any]:
    """Rows under the published names; they lie on the local hub."""

    def row(
        name: str, stages: list[str], split: str, converter: str, columns: dict[str, str], **more: Any
    ) -> dict[str, Any]:
        include = ["data/*.parquet", *(["videos/*.mp4"] if "video" in columns else [])]
        download = {"kind": "hub", "repo": f"owner/{name}", "include": include}
        place = {"name": name, "stages": stages, "files": {split: "data/*.parquet"}, "download": download}
        return {**place, "converter": converter, "columns": columns, **more}

    caption, chart = (
        {"image": "image", "caption": "caption"},
        {"image": "image", "question": "query", "answer": "label"},
    )
    clip = {"video": "video", "question": "question", "answer": "answer"}
    style = {"open_style": "user_qa"}
    return {
        "preset": "tiny",
        "tokenizer": "tokenizer",
        "stages": {
            stage: {"num_variants": 1 if stage == "eval" else 2, "examples_per_shard": 4, "limits": LIMITS}
            for stage in ("pretraining", "sft", "long", "eval")
        },
        "rows": [
            row("pixmo-cap", ["pretraining", "sft", "long"], "train", "image_caption", caption),
            row("molmo2-cap", ["sft"], "train", "image_caption", caption),
            row("molmo2-video-cap-qa", ["sft", "long"], "train", "video_qa", clip, options=style),
            row("chart-qa", ["eval"], "validation", "image_qa", chart, options={"style": "chart_qa"}),
        ],
    }


def write_recipes(folder: Path) -> None:
    """Three stages of four steps under the names of the real ones."""
    folder.mkdir()
    stages = {"stage1": ("pretraining", None), "stage2": ("sft", "stage1"), "stage3": ("long", "stage2")}
    for name, (stage, init) in stages.items():
        path = toy_run.write_recipe(folder / f"{name}.yaml", name, init, steps=4, residual_dropout=0.0)
        recipe = yaml.safe_load(path.read_text())
        datasets = {"pixmo-cap": None} | ({"molmo2-video-cap-qa": None} if stage != "pretraining" else {})
        mixture = {"groups": {"all": {"rate": 1, "datasets": datasets}}}
        shape = {"sequence_length": 768, "max_crops": 24, "roots": [f"shards/{stage}"], "mixture": mixture}
        recipe |= {"stage": stage, "tokenizer": "raw/tokenizer", "data": {**recipe["data"], **shape}}
        path.write_text(yaml.safe_dump(recipe))


def small(command: str) -> str:
    """The command with the small catalog, and plain python, which starts one rank, in place of a launcher."""
    command = re.sub(r" --catalog \S+", "", command)
    command = re.sub(r"(tools/(?:download_data|inspect_data|build_shards)\.py)", r"\1 --catalog small.yaml", command)
    command = command.replace("build_shards.py", "build_shards.py --workers 1")
    return command.replace("deepspeed molmo2", "python molmo2")


@pytest.mark.dist
@pytest.mark.timeout(600)  # about 55 commands
def test_the_commands_of_today_run(tmp_path: Path) -> None:
    run = [small(command) for command in [*commands(), *(as_run or page for page, as_run in RUN_AFTER_GUIDE.items())]]
    assert len(run) >= 50
    publish(tmp_path / "hub")
    toy_run.make_tokenizer(tmp_path / "data/raw/tokenizer")
    write_recipes(tmp_path / "recipes")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(catalog()))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 100000000}}')
    with fake_hub(tmp_path / "hub") as hub:
        toy_run.run_page("\n".join(run), tmp_path, **environment(hub, tmp_path / "home"))
    written = ("molmo2-4b/config.json", "samples.html", "sft.html", "data/exports/stage3-vllm/config.json")
    assert all((tmp_path / name).exists() for name in written)
    for name in ("stage1", "stage2", "stage3", "buffers", "workers"):
        assert (tmp_path / f"data/runs/{name}/log.jsonl").read_text().count("\n") == 4, name


def test_what_is_not_run_names_a_test_that_exists() -> None:
    reasons = [line.reason for line in lines() if line.reason]
    assert 0 < len(reasons) < 16
    for name in re.findall(r"`(test_\w+\.py)`", " ".join(reasons)):
        assert list((ROOT / "tests").rglob(name)), name


def test_every_command_of_the_original_guide_has_its_row() -> None:
    original = [line for line in ORIGINAL if not line.startswith("#")]
    assert len(original) == len(set(original)) > 60
    assert sorted(line.original for line in lines() if line.original != NO_COMMAND) == sorted(original)
