"""The model card tells where weights come from; remote code lies beside them only when asked for, and whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from exports import ABOUT, exported, noisy, reload, weights_of, write_checkpoint
from processing_cases import tokenizer_dir
from tiny_models import QWEN

from molmo2.checkpoint.lookup import open_checkpoint
from molmo2.export.card import About, about_checkpoint, model_card
from molmo2.export.check import ExportError
from molmo2.export.model import export_model


def result(score: float, chance: float | None) -> dict[str, Any]:
    return {"name": "pointing", "dataset": "d", "metric": "m", "num_questions": 50, "score": score, "chance": chance}


def write_evaluation(path: Path, step: int, results: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"benchmarks": "demo", "run": "run", "step": step, "results": results}))


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def card_of(about: About, **options: Any) -> str:
    return model_card(QWEN, 1234567, about, {"text": 1e-6, "video": 2e-6}, **{"code": "", **options})


def test_recipe_data_and_figures(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "run", tokenizer_dir())
    write_evaluation(tmp_path / "run/evaluation-demo.json", 3, [result(0.625, None)])
    write_evaluation(tmp_path / "run/evaluation-old.json", 2, [result(0.111, 0.1)])
    card = card_of(about_checkpoint(open_checkpoint(step)))
    assert "| parameters | 1,234,567 |" in card and "| step | 3 |" in card and "| started from | `stage1` |" in card
    assert "text 1.0e-06, video 2.0e-06." in card
    assert "| pixmo-cap | 75.0% | allenai/pixmo-cap | odc-by (dataset card) |" in card
    assert "| in-house | 25.0% | not known | not known |" in card
    assert "| pointing | d | m | 50 | 62.5% | - |" in card and "11.1%" not in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == json.loads((step / "recipe.json").read_text())
    assert head_of(card)["datasets"] == ["allenai/pixmo-cap"]
    assert head_of(card)["license"] == "other" and "(`stage1`)" in card
    assert "remote code" not in card and "remote code" in card_of(ABOUT, code="release")


def test_what_is_missing_is_said() -> None:
    card = card_of(ABOUT)
    assert "Not recorded." in card and "had not been evaluated" in card and "## Recipe" not in card
    assert "datasets" not in head_of(card)
    assert "\n\n\n\n" not in card


def test_first_weights_are_named() -> None:
    init = {"llm": "Qwen/Qwen3-0.6B", "vit": "raw/siglip2", "molmo2": None}
    card = card_of(About(origin={}, recipe={"init": init}))
    assert "| started from | llm `Qwen/Qwen3-0.6B`, vit `raw/siglip2` |" in card
    assert "started from (llm `Qwen/Qwen3-0.6B`, vit `raw/siglip2`)" in card
    assert "started from" not in card_of(About(origin={}, recipe={"init": None})).split("## Licence")[0]


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "run", tokenizer_dir()))
    path = tmp_path / "run/evaluation-demo.json"
    for text in ("{", "[]", '{"step": 3}', '{"step": 3, "results": [{}]}'):
        path.write_text(text)
        with pytest.raises(ExportError, match=r"evaluation-demo\.json"):
            about_checkpoint(checkpoint)


CODE = "raise RuntimeError('remote code was run')\n"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A download of a release, as far as remote code goes."""
    directory = tmp_path / "release"
    directory.mkdir()
    for part in ("configuration", "modeling", "processing", "image_processing", "video_processing"):
        (directory / f"{part}_molmo2.py").write_text(CODE)
    maps = {
        "config.json": {
            "AutoConfig": "configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": "owner/name--modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "processor_config.json": {"AutoProcessor": "processing_molmo2.Molmo2Processor"},
        "preprocessor_config.json": {"AutoImageProcessor": ["image_processing_molmo2.Molmo2ImageProcessor", None]},
        "video_preprocessor_config.json": {"AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor"},
    }
    for name, auto_map in maps.items():
        (directory / name).write_text(json.dumps({"auto_map": auto_map, "hidden_size": 9}))
    (directory / "secrets.txt").write_text("not code")
    return directory


def test_remote_code_lies_beside_the_weights_and_transformers_ignores_it(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(QWEN, weights_of(noisy(QWEN)), tokenizer_dir(), out, ABOUT, release)
    copied = {path.name for path in out.glob("*.py")}
    assert copied == {path.name for path in release.glob("*.py")} and not (out / "secrets.txt").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_molmo2.Molmo2Config",
        "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
    }
    assert "hidden_size" not in config
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    processor, images, videos = (json.loads((out / name).read_text()) for name in names)
    assert processor["auto_map"] == {"AutoProcessor": "processing_molmo2.Molmo2Processor"}
    assert images["auto_map"]["AutoImageProcessor"] == ["image_processing_molmo2.Molmo2ImageProcessor", None]
    assert set(videos["auto_map"]) == {"AutoVideoProcessor"} and videos["num_frames"] == 384
    model, preprocess = reload(out)  # the code raises when it runs
    assert type(model).__module__.startswith("transformers.") and type(preprocess).__module__.startswith(
        "transformers."
    )
    assert "remote code" in (out / "README.md").read_text()
    assert not list(exported(noisy(QWEN), out).glob("*.py"))  # exported again without: nothing is left of it


def refused(release: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(QWEN, weights_of(noisy(QWEN)), tokenizer_dir(), tmp_path / "out", ABOUT, release)
    assert not (tmp_path / "out").exists()


def test_unusable_remote_code_is_refused(release: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.py"
    outside.write_text(CODE)
    (release / "linked.py").symlink_to(outside)
    refused(release, tmp_path, r"linked\.py: points outside")
    (release / "linked.py").unlink()
    (release / "linked.py").symlink_to("modeling_molmo2.py")  # inside: the file that it stands for
    shutil.move(release / "processing_molmo2.py", tmp_path)
    refused(release, tmp_path, r"processing_molmo2\.Molmo2Processor, but no such")
    (release / "config.json").write_text("{}")
    refused(release, tmp_path, "no auto_map")
    (release / "config.json").write_text('{"auto_map": {"AutoConfig": 3}}')
    refused(release, tmp_path, r"config\.json: no readable auto_map")
    (release / "config.json").unlink()
    refused(release, tmp_path, r"no config\.json")
    refused(tmp_path / "nowhere", tmp_path, r"no \*\.py files")
