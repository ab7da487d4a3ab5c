import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import demo_eval
import numpy as np
import pytest
import webdataset as wds
from demo_eval import DEMO
from fork_server import python

from molmo2.eval.metrics.scores import (
    count_exact,
    exact_match,
    hits,
    points_in_boxes,
    read_count,
)
from molmo2.eval.questions import as_batch, first_draws, questions_of, read_samples
from molmo2.eval.runner import run_suite
from molmo2.pages import averaged, curve
from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.processor import build_processor
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import PointGroup, Points, Text
from shards.stream.dataset import DatasetError, open_dataset
from tools.demo_report import next_steps, read_finished, report_page

DIGITS = Points(style="point_count", label="digits", groups=(PointGroup(at=1, points=((0.1, 0.2), (0.5, 0.5))),))


def test_exact_match_ignores_case_space_and_full_stop():
    asked = Text(style="user_qa", question="Where?", answer="top left")
    assert exact_match(" Top  left.", asked, {}).value == 1
    assert exact_match("left", asked, {}).value == 0
    assert exact_match("", asked, {}).value == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('Counting the <points coords="1 1 100 200 2 500 500">digits</points> shows a total of 2.', 2),
        ("There are none.", 0),
        ("6", 6),
        ("There are 3 of them, 12 in all.", 12),
        ('<points coords="1 1 100 200 2 500', None),
        ('Counting the <points coords="1 1 100 200', None),
        ("many", None),
    ],
)
def test_read_count(text, count):
    assert read_count(text) == count


def test_count_needs_the_number_that_is_there():
    right = 'Counting the <points coords="1 1 100 200">digits</points> shows a total of 2.'
    assert count_exact(right, DIGITS, {}).value == 1
    assert count_exact(right.replace("of 2", "of 3"), DIGITS, {}).value == 0


def test_hits_gives_every_box_a_point_of_its_own():
    left, right, both = (0, 0, 10, 10), (8, 0, 20, 10), (9, 5)
    assert hits([both], [left, right]) == 1
    assert hits([both, (1, 1)], [left, right]) == 2
    assert hits([(1, 1), both], [left, right]) == 2
    assert hits([(1, 1), (2, 2)], [left, right]) == 1
    assert hits([(50, 50)], [left]) == 0
    assert hits([], [left]) == 0


def test_points_in_boxes_counts_misses_and_extras():
    row = {"boxes": [{"x0": 0, "y0": 0, "x1": 20, "y1": 50}]}
    one = '<points coords="1 1 100 200">digit 3</points>'
    assert points_in_boxes(one, DIGITS, row).value == 1
    assert points_in_boxes(one, DIGITS, row).chance == pytest.approx(0.1)
    assert points_in_boxes('<points coords="1 1 100 200 2 900 900">x</points>', DIGITS, row).value == 0.5
    assert points_in_boxes('<points coords="1 1 900 200">x</points>', DIGITS, row).value == 0
    assert points_in_boxes("there", DIGITS, row).value == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    return root, demo_eval.build(root, batch_size=32)


def test_every_benchmark_asks_held_out_rows_in_one_form(demo):
    root, _ = demo
    for benchmark in DEMO.benchmarks:
        dataset = open_dataset(str(root / "shards/eval"), benchmark.dataset)
        assert list(dataset.index.build["files"]) == ["data/validation-00000-of-00001.parquet"]
        assert dataset.index.num_variants == 1
        found = demo_eval.questions(root / "shards", benchmark.dataset)
        assert len(found) == dataset.index.totals.annotations >= 4
        assert len({question.name for question in found}) == len(found)


def test_a_prompt_from_a_shard_is_the_processors(demo):
    """The tokens that `Processor.prompt` makes of the example itself, as chat does; pixels after one JPEG."""
    root, subject = demo
    for name in ("demo-image-qa", "demo-count", "demo-video-qa"):
        (row,) = demo_eval.CATALOG.select("eval", [name])
        table = open_rows(row, "eval", root / "raw" / name)
        (group,) = read_groups(row, "eval", root / "raw" / name, table, table.groups(row.group_by)[:1])
        (example,) = convert(group)
        dataset = open_dataset(str(root / "shards/eval"), name)
        ((draw, stored),) = read_samples(dataset.tars, first_draws(dataset, 1))
        batch = as_batch(subject.processor.layout, draw, stored)
        assert len(questions_of(draw, stored)) == len(example.annotations)
        for number, annotation in enumerate(example.annotations):
            wanted = subject.processor.prompt(example, demo_eval.CATALOG.stages["eval"].limits, number)
            found, answer = prompt_of(batch, number)
            assert found.input_ids.tolist() == wanted.input_ids.tolist()
            assert found.is_visual.tolist() == wanted.is_visual.tolist()
            assert np.array_equal(found.pooling.numpy(), wanted.pooling)
            assert np.abs(found.pixels.numpy().astype(int) - wanted.pixels).mean() < 3
            if isinstance(annotation, Text):
                assert subject.processor.tokenizer.decode(answer.tolist()) == annotation.answer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files to the collector
def test_plain_webdataset_reads_what_was_asked(demo):
    root, _ = demo
    tar = str(root / "shards/eval/demo-count/000000.tar")
    found = {s["__key__"]: s["asked.json.gz"] for s in wds.WebDataset(tar, shardshuffle=False).decode("rgb8")}
    for question in demo_eval.questions(root / "shards", "demo-count"):
        one = found[question.key][question.number]
        assert (one["kind"], one["label"], one["facts"]) == ("points", question.asked.label, question.asked.facts)


@pytest.mark.slow
def test_evaluation_asks_everything_and_scores_it(demo, tmp_path):
    """An untrained model: the answers are noise, the figures must be in range, batches must not change them."""
    root, subject = demo
    shards = str(root / "shards")
    results = run_suite(DEMO, shards, subject, tmp_path / "3", "digest", limit=3).results
    assert [result["name"] for result in results] == [b.name for b in DEMO.benchmarks]
    for result in results:
        assert result["num_questions"] >= 3
        assert 0 <= result["score"] <= 1
        assert 0 < result["chance"] < 0.5
        assert all(answer["picture"].startswith("data:image/png;base64,") for answer in result["answers"])
    alone = run_suite(DEMO, shards, subject, tmp_path / "1", "digest", limit=1).results
    for one, many in zip(alone, results, strict=True):
        assert one["answers"][0] == many["answers"][0]


def test_a_model_that_copies_the_reference_scores_full(demo):
    """Reference answers through the metrics: what the processor writes is what the metrics read."""
    root, subject = demo
    tokenizer = subject.processor.tokenizer
    for benchmark in DEMO.benchmarks:
        dataset = open_dataset(str(root / "shards/eval"), benchmark.dataset)
        for draw, stored in read_samples(dataset.tars, first_draws(dataset)):
            batch = as_batch(subject.processor.layout, draw, stored)
            for question in questions_of(draw, stored):
                _, answer = prompt_of(batch, question.number)
                text = tokenizer.decode(answer.tolist())
                assert benchmark.metric(text, question.asked, question.asked.facts).value == 1, (benchmark.name, text)
                assert len(answer) < benchmark.max_new_tokens


def test_shards_of_another_stage_or_tokenizer_are_refused(demo, tmp_path):
    root, subject = demo
    settings = replace(demo_eval.settings_of(root / "raw"), stage="sft")
    other = replace(subject, processor=build_processor(settings))
    with pytest.raises(DatasetError, match="conditioning: 'eval', wanted 'sft'"):
        run_suite(DEMO, str(root / "shards"), other, tmp_path, "digest", limit=1)


def test_curve_averages_long_logs():
    assert averaged([1, 2, 3], [1.0, 2.0, 3.0], 300) == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert averaged([10, 20, 30, 40, 50], [1.0, 3.0, 5.0, 7.0, 9.0], 2) == ([20, 45], [3.0, 8.0])
    assert curve([1], [1.0], "loss") == ""
    assert curve([1, 2], [2.0, 1.0], "loss").count("<svg") == 1


def test_report_holds_everything_and_escapes_text(tmp_path):
    run = tmp_path / "demo-stage1"
    run.mkdir()
    summary = {
        "name": "demo-stage1",
        "stage": "pretraining",
        "steps": 3,
        "tokens": 1234,
        "loss_first": 6.2,
        "loss_last": 1.5,
        "fill": 0.97,
        "seconds": 12.0,
    }
    with pytest.raises(ValueError, match="not finished"):
        read_finished(run)
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 6.0 / i}) + "\n" for i in (1, 2, 3)))
    stage = read_finished(run)
    ((title, curve_of_loss),) = stage.curves
    assert (stage.summary, title) == (summary, "demo-stage1: loss")
    assert ">6</text>" in curve_of_loss and ">3</text>" in curve_of_loss  # highest loss, last step
    answer = {"prompt": "Which <digit>?", "prediction": "<b>7", "score": 1.0, "picture": None, "key": "a"}
    result = {"name": "image QA", "metric": "exact_match", "num_questions": 1, "score": 1.0, "chance": None}
    result |= {"corpus": {}, "answers": [answer | {"wanted": "7"}]}
    evaluation = {"results": [result], "losses": [], "skipped": {}}
    page = report_page([stage], evaluation, {"exported model": "x/y"})
    assert "Which &lt;digit&gt;?" in page and "&lt;b&gt;7" in page
    assert "1,234" in page and "<svg" in page and "x/y" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.slow
def test_the_demo_report_shows_benchmarks_without_a_target(tmp_path):
    """The tool as `make demo` runs it, on the files that training and evaluation leave."""
    for stage in (1, 2, 3):
        run = tmp_path / "runs" / f"demo-stage{stage}"
        run.mkdir(parents=True)
        summary = {"name": run.name, "stage": "sft", "steps": 2, "tokens": 10, "fill": 1.0, "seconds": 3.0}
        (run / "summary.json").write_text(json.dumps({**summary, "loss_first": 2.0, "loss_last": 1.0}))
        (run / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": 2.0 / s}) + "\n" for s in (1, 2)))
    result = {"name": "pointing at all", "metric": "points_in_boxes", "num_questions": 1, "score": 0.5}
    result |= {"chance": None, "target": None, "answers": [], "corpus": {}, "num_left_out": 0}
    evaluation = {
        "run": "demo-stage3",
        "checkpoint": "here",
        "benchmarks": "demo",
        "step": 2,
        "seconds": 1.0,
        "results": [result],
        "losses": [],
        "skipped": {},
    }
    (tmp_path / "runs" / "demo-stage3" / "evaluation-demo.json").write_text(json.dumps(evaluation))
    tool = Path(__file__).parents[3] / "tools" / "demo_report.py"
    environment = {**os.environ, "MOLMO2_DATA": str(tmp_path)}
    run = subprocess.run([python(), tool], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "pointing at all" in run.stdout
    assert "50.0%" in run.stdout
    assert (tmp_path / "runs" / "demo-report.html").is_file()
    assert (
        run.stdout.splitlines()[-4:]
        == next_steps(tmp_path / "runs/demo-stage3", tmp_path / "runs/demo-report.html")[-4:]
    )


def test_the_demo_ends_with_commands_that_run_as_printed(monkeypatch):
    """The real parsers take every command of its last lines, and the pages and recipes that it names exist."""
    root = Path(__file__).parents[3]
    lines = next_steps(Path("some folder/demo export"), Path.cwd() / "runs/report.html")
    assert any(line.endswith("  runs/report.html") for line in lines)
    parsed = {}
    for program, text in re.findall(r"python tools/(\w+)\.py (.+)", "\n".join(lines)):
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(text)])
        parsed[program] = runpy.run_path(str(root / f"tools/{program}.py"))["parse_args"]()
    assert parsed["chat"].web and parsed["chat"].checkpoint == "some folder/demo export"
    assert parsed["new_dataset"].go and parsed["new_dataset"].name == "mine"
    (page, first) = re.search(r"(docs/\S+\.md), with (recipes/\S+\.yaml) to stage3.yaml", lines[-1]).groups()
    assert (root / page).is_file() and (root / first).is_file() and (root / "recipes/stage3.yaml").is_file()
