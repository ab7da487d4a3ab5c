"""What the preview says about the storage, in exact numbers, beside what is really read."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from toy import LAYOUT, write_dataset

from molmo2.config import Recipe, load_recipe
from molmo2.inspection.shares import DrawCounts, draw_steps
from molmo2.inspection.storage_load import storage_lines
from shards.storage.base import take_tally
from shards.storage.s3 import S3Storage
from shards.stream.dataset import open_dataset
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Plan, PlanSettings

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo/stage2.yaml"
MIXTURE = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"alpha": None, "beta": None}}}})
SETTINGS = PlanSettings(sequence_length=512, max_crops=24, packs_per_step=4, window=64)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two datasets, one of which counts as one in a bucket."""
    root = tmp_path_factory.mktemp("load")
    for name in ("alpha", "beta"):
        write_dataset(root, name, 24)
    alpha, beta = (open_dataset(str(root), name) for name in ("alpha", "beta"))
    far = dataclasses.replace(alpha, storage=S3Storage("s3://bucket/sft/alpha"))
    return Plan([far, beta], MIXTURE, SETTINGS)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    return load_recipe(DEMO, ["train.sp=2"])


def test_lines_hold_exact_numbers(plan: Plan, recipe: Recipe) -> None:
    """Four steps of 100,000 requests and 2,000 MB each; groups of two ranks read every sample twice."""
    drawn = DrawCounts(4, samples=[300_000, 100_000], bytes=[2_000_000_000, 6_000_000_000])
    drawn.text_samples, drawn.text_bytes = 100_000, 800_000_000
    lines = storage_lines(recipe, plan, drawn, [1, 8, 64], step_seconds=20.0)
    assert lines[0].startswith("storage: the 100,000.0 samples of a step are 2,000.00 MB in ")
    rows = [line.split() for line in lines]
    assert rows[2:4] == [
        ["beta", "1,500.00", "75.0%", "25,000.0", "25.0%", "60.0", "local"],
        ["alpha", "500.00", "25.0%", "75,000.0", "75.0%", "6.7", "s3://bucket/sft/alpha"],
    ]
    assert lines[4] == "text-only samples are 10.0% of the bytes and 25.0% of the requests"
    assert lines[5] == "each rank reads, with 2 ranks to a pack:"
    assert rows[7:9] == [  # one rank cannot share a pack with another
        ["8", "25,000.0", "500.00", "1,250.0", "25.00", "10,000.0", "200.00"],
        ["64", "3,125.0", "62.50", "156.2", "3.12", "10,000.0", "200.00"],
    ]
    assert lines[9].startswith("s3://bucket/sft: Amazon S3 supports 5,500 requests") and lines[9].endswith(" 27.3 s")
    assert lines[10].startswith("WARNING: 7,500 requests a second to s3://bucket/sft: ") and len(lines) == 11
    assert storage_lines(recipe, plan, drawn, [8], step_seconds=28.0)[-1].endswith(" 27.3 s")  # no warning
    assert rows[6][-3:] != storage_lines(recipe, plan, drawn, [8])[6].split()[-3:]  # no rates without a time


def test_counted_bytes_are_those_that_a_run_reads(plan: Plan) -> None:
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"beta": None}}}})
    near = Plan(plan.datasets[1:], mixture, SETTINGS)
    drawn = draw_steps(near, 5)
    take_tally()  # what other tests have read
    batches = list(itertools.islice(make_loader(near, Cursor(), LAYOUT, micro_batch=4), 5))
    assert sum(drawn.bytes) == sum(batch.reads.counts["bytes"] for batch in batches) > 0
    assert sum(drawn.samples) == sum(len(batch.reads.read) for batch in batches)
    assert 0 < drawn.text_samples < drawn.samples[0] and 0 < drawn.text_bytes < drawn.bytes[0]
