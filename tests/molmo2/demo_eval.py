"""Shards of stage "eval" of a small demo, and a random model to ask."""

import functools
from pathlib import Path

import torch

from molmo2.demo.sets import SETS, make_set, texts
from molmo2.eval.benchmarks import load_suites
from molmo2.eval.questions import Question, first_draws, questions_of, read_samples
from molmo2.eval.runner import Subject
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor
from shards.build.builder import build_dataset
from shards.catalog import Row, load_catalog
from shards.stream.dataset import open_dataset

DEMO = load_suites()["demo"]
CATALOG = load_catalog(DEMO.catalog)


def make_raw(raw: Path) -> None:
    """A few examples of every set, and their tokenizer."""
    for one in SETS:
        make_set(one, raw, seed=0, scale=0.004, progress=lambda made, total: iter(made))
    train_demo_tokenizer(texts(raw), raw / "tokenizer", PRESETS["tiny"].text.vocab_size)


def settings_of(raw: Path) -> ProcessorSettings:
    return ProcessorSettings(preset="tiny", tokenizer_dir=str(raw / "tokenizer"), stage="eval", num_variants=1)


def build_row(row: Row, raw: Path, shards: Path) -> None:
    make, out = functools.partial(build_processor, settings_of(raw)), shards / "eval" / row.name
    build_dataset(row, "eval", CATALOG.stages["eval"], make, raw=raw / row.folder, out=out, reject_budget=1)


def build(root: Path, batch_size: int = 2) -> Subject:
    """`root`/raw and `root`/shards/eval; who is asked about them."""
    make_raw(root / "raw")
    for row in CATALOG.select("eval", sorted({benchmark.dataset for benchmark in DEMO.benchmarks})):
        build_row(row, root / "raw", root / "shards")
    processor = build_processor(settings_of(root / "raw"))
    model = Molmo2(PRESETS["tiny"]).init_weights(0).eval()
    return Subject(model=model, processor=processor, device=torch.device("cpu"), batch_size=batch_size)


def questions(shards: Path, name: str, limit: int | None = None) -> list[Question]:
    dataset = open_dataset(str(shards / "eval"), name)
    return [one for pair in read_samples(dataset.tars, first_draws(dataset, limit)) for one in questions_of(*pair)]
