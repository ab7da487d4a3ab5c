"""Every row of every suite: files in the published layout -> shards -> prompts -> answers -> score."""

import functools
import itertools
from pathlib import Path
from typing import Any

import PIL.Image
import published_images
import published_points
import published_tracks
import published_videos
import pytest
import torch
from catalog_cases import video

from molmo2.eval import runner
from molmo2.eval.benchmarks import Suite, load_suites
from molmo2.eval.questions import first_draws, questions_of, read_samples
from molmo2.eval.runner import Subject, run_suite
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor
from shards.build.builder import build_dataset
from shards.catalog import Row, load_catalog
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Example
from shards.stream.dataset import open_dataset
from shards.stream.plan import Draw

CATALOG = load_catalog("molmo2-eval")
CASES = published_images.CASES | published_points.CASES | published_tracks.CASES | published_videos.CASES
# (suite, dataset) -> the benchmark that its case is of
BENCHMARKS = {
    (name, one.dataset): one for name, suite in load_suites().items() if name != "demo" for one in suite.benchmarks
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ProcessorSettings:
    """A small processor, with a tokenizer of bytes and a few words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_demo_tokenizer(["what is there? a dog runs on grass"] * 4, folder, PRESETS["tiny"].text.vocab_size)
    return ProcessorSettings(preset="tiny", tokenizer_dir=str(folder), stage="eval", num_variants=1)


def write_videos(row: Row, raw: Path) -> None:
    """Write the videos and frames that the rows name, which the fixtures do not have."""
    table = open_rows(row, "eval", raw)
    groups = read_groups(row, "eval", raw, table, table.groups(row.group_by))
    for example in itertools.chain.from_iterable(map(convert, groups)):
        if not isinstance(example, Example) or example.video is None:
            continue
        path = raw / example.video.path
        if path.suffix:
            path.write_bytes(video("64x48:60:2"))
            continue
        path.mkdir(parents=True, exist_ok=True)
        for number in range(24):
            PIL.Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(path / f"{number:05d}.jpg")


@pytest.mark.parametrize(("suite", "name"), list(BENCHMARKS))
def test_published_files_become_a_score(
    suite: str, name: str, settings: ProcessorSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is replaced by one that gives the case's answers; the prompt of each question is rendered and read."""
    make, cases = CASES[name]
    row = next(row for row in CATALOG.rows if row.name == name)
    raw, shards = tmp_path / "raw" / row.folder, tmp_path / "shards"
    make(raw)
    write_videos(row, raw)
    make_processor = functools.partial(build_processor, settings)
    stage, out = CATALOG.stages["eval"], shards / "eval" / name
    build_dataset(row, "eval", stage, make_processor, raw=raw, out=out, reject_budget=1)
    model = Molmo2(PRESETS["tiny"]).init_weights(0).eval()
    subject = Subject(model=model, processor=make_processor(), device=torch.device("cpu"), batch_size=2)
    dataset, tokenizer = open_dataset(str(shards / "eval"), name), subject.processor.tokenizer
    samples = read_samples(dataset.tars, first_draws(dataset))
    questions = [question for draw, stored in samples for question in questions_of(draw, stored)]
    pairs = zip(questions, cases, strict=True)
    replies = {(question.draw, question.number): reply for question, (reply, _) in pairs}
    draws: list[Draw] = []
    asked: list[tuple[Draw, int]] = []
    as_batch, prompt_of = runner.as_batch, runner.prompt_of

    def batch(layout: Any, draw: Draw, stored: Any) -> Any:
        draws.append(draw)
        return as_batch(layout, draw, stored)

    def prompt(batch: Any, number: int) -> Any:
        asked.append((draws[-1], number))
        return prompt_of(batch, number)

    def reply(model: Any, prompts: Any, max_new_tokens: int, end: int) -> list[list[int]]:
        assert all(len(one.input_ids) and len(one.pixels) for one in prompts)
        return [tokenizer.encode(replies[key]) for key in asked[len(asked) - len(prompts) :]]

    monkeypatch.setattr(runner, "as_batch", batch)
    monkeypatch.setattr(runner, "prompt_of", prompt)
    monkeypatch.setattr(runner, "generate", reply)
    chosen = Suite("molmo2-eval", (BENCHMARKS[suite, name],))
    outcome = run_suite(chosen, str(shards), subject, tmp_path / "answers", "digest")
    (result,) = outcome.results
    assert not outcome.skipped and result["num_questions"] == len(cases)
    assert result["score"] == pytest.approx(sum(score for _, score in cases) / len(cases))
