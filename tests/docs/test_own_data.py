"""docs/own-data.md as written: its files, its commands; only the model is a small one."""

import re
from pathlib import Path

import pytest
import toy_run
from catalog_cases import image, video

from shards.catalog import CatalogError, load_catalog

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/own-data.md").read_text()
SMALL = {  # what stands on the page -> what a test can run
    "preset: 4b": "preset: tiny",
    "model: 4b\n": "model: tiny\n",
    "init: {molmo2: allenai/Molmo2-4B}": "init: null",
    "steps: 500": "steps: 2",
    "packs_per_step: 16": "packs_per_step: 2\n  precision: fp32\n  zero_stage: 1",
    "llm: {lr: 1.0e-5}": "llm: {lr: 1.0e-5}\n  freeze_base_embedding: false",
    "sequence_length: 4096": "sequence_length: 768",
    "max_crops: 128": "max_crops: 32",
    "deepspeed molmo2": "python molmo2",  # one rank, in a process of the fork server
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def small(text: str) -> str:
    for old, new in SMALL.items():
        text = text.replace(old, new)
    return text


def test_the_message_about_wrong_names_is_what_a_user_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    catalog = (
        blocks("yaml")[0]
        .replace("max_points: 60", "max_point: 60")
        .replace("question: question", "qestion: question", 1)
    )
    Path("mine.yaml").write_text(catalog)
    with pytest.raises(CatalogError) as error:
        load_catalog("mine.yaml")
    assert f"{error.value}\n" == blocks("text")[0]


@pytest.mark.dist
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    assert all(old in PAGE for old in SMALL)
    raw = tmp_path / "data/raw/mine"
    (raw / "images").mkdir(parents=True)
    (raw / "videos").mkdir()
    for name, colour in (("1", "red"), ("2", "blue")):
        (raw / f"images/{name}.png").write_bytes(image(f"60x40:{colour}"))
    (raw / "videos/1.mp4").write_bytes(video("64x48:30:10"))
    toy_run.make_tokenizer(tmp_path / "data/raw/tokenizer")
    names = re.findall(r"`data/raw/mine/(\w+\.jsonl)`", PAGE)
    for name, text in zip(names, blocks("json"), strict=True):
        (raw / name).write_text(text)
    for name, text in zip(("mine.yaml", "recipe.yaml"), blocks("yaml"), strict=True):
        (tmp_path / name).write_text(small(text))
    (commands,) = blocks("bash")
    toy_run.run_page(small(commands), tmp_path)
    assert (tmp_path / "mine-export/config.json").exists()
    assert "my-points" in (tmp_path / "mine.html").read_text()
    for dataset, samples in (
        ("my-captions", 2),
        ("my-questions", 2),
        ("my-points", 4),
        ("my-videos", 2),
        ("my-talk", 3),
    ):
        index = (tmp_path / f"data/shards/sft/{dataset}/index.json").read_text()
        assert f'"samples": {samples},' in index and '"rejects": 0' in index
