"""A small copy of the demo's raw data, and builds of it with the real processor."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molmo2.demo.sets import SETS, make_set, texts
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor
from shards.build.builder import Built, build_dataset
from shards.build.pool import worker_pool
from shards.build.task import ProcessorFactory
from shards.catalog import Catalog, Stage, StageSettings, load_catalog
from shards.format import DatasetIndex
from shards.schema import Example, Limits, Sample

QUESTIONS: dict[str, Any] = {  # a row of a user's catalog
    "name": "mine",
    "stages": ["sft"],
    "files": {"train": "rows.jsonl"},
    "converter": "image_qa",
    "columns": {"image": "image", "question": "question", "answer": "answer"},
    "options": {"style": "user_qa"},
}


def quiet(made: Iterable[Any], _: int) -> Iterator[Any]:
    return iter(made)


def make_raw(raw: Path, scale: float = 0.03) -> Path:
    for demo in SETS:
        make_set(demo, raw, 0, scale, quiet)
    train_demo_tokenizer(texts(raw), raw / "tokenizer")
    return raw


def catalog(stage: Stage, examples_per_shard: int = 8) -> Catalog:
    loaded = load_catalog("demo")
    settings = loaded.stages[stage].model_copy(update={"examples_per_shard": examples_per_shard})
    return loaded.model_copy(update={"stages": {**loaded.stages, stage: settings}})


def factory(raw: Path, stage: Stage, num_variants: int = 4) -> ProcessorFactory:
    settings = ProcessorSettings(
        preset="tiny", tokenizer_dir=str(raw / "tokenizer"), stage=stage, num_variants=num_variants
    )
    return functools.partial(build_processor, settings)


def build(raw: Path, out: Path, name: str, stage: Stage = "sft", **options: Any) -> DatasetIndex:
    """Build one dataset of the demo catalog into out/name; the index of the whole."""
    index = build_part(raw, out, name, stage, **options).index
    assert index is not None
    return index


def build_part(raw: Path, out: str | Path, name: str, stage: Stage = "sft", **options: Any) -> Built:
    """As `build`, for `task_of` (r, n) as well."""
    rows = catalog(stage)
    (row,) = rows.select(stage, [name])
    settings = options.pop("settings", rows.stages[stage])
    row = row.model_copy(update=options.pop("row", {}))
    make = factory(raw, stage, settings.num_variants)
    with worker_pool(make, options.pop("workers", 1)) as pool:
        return build_dataset(row, stage, settings, make, raw=raw / name, out=f"{out}/{name}", pool=pool, **options)


def small_shards() -> StageSettings:
    """Settings of stage "sft" with shards of two groups of rows."""
    return catalog("sft", examples_per_shard=2).stages["sft"]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class KillingProcessor:
    """A processor that kills its process at one example, as often as the folder `marks` has files."""

    def __init__(self, make: ProcessorFactory, key: str, marks: Path) -> None:
        self.processor, self.key, self.marks = make(), key, marks
        self.layout, self.settings = self.processor.layout, self.processor.settings

    def __call__(self, example: Example, limits: Limits) -> Sample:
        if example.key.startswith(self.key) and (left := sorted(self.marks.iterdir())):
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.processor(example, limits)
