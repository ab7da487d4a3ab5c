"""A catalog of one's own: a share of its rows is held out, asked with the prompts of training, and scored."""

import argparse
import functools
import json
import tarfile
from pathlib import Path

import PIL.Image
import pytest
import torch
import toy_run
import yaml

from molmo2.config import load_recipe
from molmo2.eval.benchmarks import own_suite
from molmo2.eval.losses import held_out_loss
from molmo2.eval.runner import Subject, run_suite
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from molmo2.training.validation import open_held_out
from shards.build.builder import build_dataset
from shards.catalog import load_catalog
from shards.stream.dataset import DatasetError
from tools.evaluate import print_list, what_to_evaluate

CATALOG = """
preset: tiny
tokenizer: tokenizer
stages: {sft: {num_variants: 1, examples_per_shard: 8, limits: {sequence_length: 192, max_crops: 6, image_crops: 2}}}
rows:
  - name: mine
    stages: [sft]
    files: {train: rows.jsonl}
    held_out: 30 %
    metric: exact_match
    converter: image_qa
    columns: {image: image, question: question, answer: answer}
    options: {style: text_vqa}
  - name: talk
    raw: mine
    stages: [sft]
    files: {train: talk.jsonl}
    held_out: 30 %
    converter: chat
    columns: {messages: messages}
    options: {style: user_qa}
folders: {mine: {download: {kind: none}}}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw data, `mine.yaml`, and shards of both stages."""
    root = tmp_path_factory.mktemp("own")
    (root / "raw/mine").mkdir(parents=True)
    PIL.Image.new("RGB", (40, 30), "red").save(root / "raw/mine/1.png")
    for name, n in ((name, n) for name in ("rows", "talk") for n in range(12)):
        PIL.Image.new("RGB", (40, 30 + n), "red").save(root / f"raw/mine/{n}.png")
        turns = [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]
        row = {"image": f"{n}.png", "question": f"How many is {n}?", "answer": f"{n}.", "messages": turns}
        with open(root / f"raw/mine/{name}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    toy_run.make_tokenizer(root / "raw/tokenizer")
    (root / "mine.yaml").write_text(CATALOG)
    catalog = load_catalog(str(root / "mine.yaml"))
    for stage in ("sft", "eval"):
        make = functools.partial(build_processor, settings_of(root, stage))
        for row in catalog.require(stage):
            out = root / "shards" / stage / row.name
            build_dataset(row, stage, catalog.stages[stage], make, raw=root / "raw/mine", out=out)
    return root


def settings_of(root: Path, stage: str) -> ProcessorSettings:
    return ProcessorSettings(preset="tiny", tokenizer_dir=str(root / "raw/tokenizer"), stage=stage, num_variants=1)


def prompts(root: Path, stage: str, name: str) -> dict[int, str]:
    """The user's text of every sample, by the row that it was made of."""
    texts = {}
    for path in (root / "shards" / stage / name).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    texts[record["source"]["row"]] = record["variants"][0]["messages"][0]["content"]
    return texts


@pytest.mark.parametrize(("name", "form"), [("mine", "text_vqa: How many is {}?"), ("talk", "And {}?")])
def test_held_out_rows_have_the_prompts_of_training(own: Path, name: str, form: str) -> None:
    train, test = (prompts(own, stage, name) for stage in ("sft", "eval"))
    assert train and test and not train.keys() & test.keys()
    assert train | test == {row: form.format(row) for row in range(12)}


def test_metric_and_loss_of_the_held_out_rows(own: Path, tmp_path: Path) -> None:
    catalog = str(own / "mine.yaml")
    args = argparse.Namespace(catalog=catalog, benchmarks=None, loss=None, shards=str(own / "shards"))
    (suite,), losses = what_to_evaluate(args)
    assert [benchmark.name for benchmark in suite.benchmarks] == ["mine"]
    assert losses == {"mine": catalog, "talk": catalog}
    args.loss = "talk"
    assert what_to_evaluate(args)[1] == {"talk": catalog} and not what_to_evaluate(args)[0][0].benchmarks
    with pytest.raises(ValueError, match=r"--benchmarks 'mien': no row of .* did you mean 'mine'"):
        own_suite(catalog, "mien")
    args.catalog = None
    assert what_to_evaluate(args)[1] == {"talk": ""}  # built, so that no catalog is needed
    model = Molmo2(PRESETS["tiny"]).init_weights(0).eval()
    subject = Subject(model=model, processor=build_processor(settings_of(own, "eval")), device=torch.device("cpu"))
    outcome = run_suite(suite, str(own / "shards"), subject, tmp_path, "digest", limit=2)
    assert [(result["name"], result["num_questions"]) for result in outcome.results] == [("mine", 2)]
    loss = held_out_loss("talk", "", str(own / "shards"), subject, tmp_path, "digest")
    assert loss is not None and loss["num_samples"] == len(prompts(own, "eval", "talk")) and loss["loss"] > 0


def test_the_list_of_a_catalog_of_ones_own(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_list(str(own / "mine.yaml"), str(own / "shards"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["mine", "mine", "exact_match", "mine", "built"], ["-", "-", "loss", "only", "talk", "built"]]
    print_list(str(own / "mine.yaml"), str(tmp_path))
    assert "not built" in capsys.readouterr().out


def test_training_validates_on_shards_of_stage_eval(own: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(toy_run.write_recipe(tmp_path / "recipe.yaml", "toy").read_text())
    recipe["eval"] = {"roots": [str(own / "shards/eval")], "datasets": ["mine", "talk"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.eval is not None
    processor = build_processor(settings_of(own, "sft")).settings
    assert [dataset.name for dataset in open_held_out(loaded, loaded.eval, processor).datasets] == ["mine", "talk"]
    other = {**processor, "tokenizer": "another"}
    with pytest.raises(DatasetError, match=r"tokenizer: .*wanted 'another'"):
        open_held_out(loaded, loaded.eval, other)
