"""Evaluations as they are run: several ranks, killed and resumed, data that are missing, losses, and the tool."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molmo2.demo.sets import SETS, make_set, texts
from molmo2.eval.answers import Line, Store, weights_digest
from molmo2.eval.benchmarks import SUITES, choose
from molmo2.eval.held_out import as_batch, held_out_loss
from molmo2.eval.published import WITHOUT
from molmo2.eval.report import render_worst
from molmo2.eval.runner import Ranks, Subject, evaluate, questions, read_examples
from molmo2.export import export_model
from molmo2.export_card import About
from molmo2.model.config import PRESETS
from molmo2.model.molmo2 import Molmo2
from molmo2.processing import ProcessorSettings, build_processor
from molmo2.processing.tokenizer import train_demo_tokenizer
from shards.catalog import Filter, load_catalog

ROOT = Path(__file__).resolve().parents[2]
DEMO = SUITES["demo"]
CATALOG = load_catalog(DEMO.catalog)

# the published evaluations of Molmo2, by the names of their datasets
PUBLISHED = """
pixmo-cap pixmo-ask-model-anything pixmo-count pixmo-points-eval vqa-v2 text-vqa chart-qa doc-qa info-qa ai2d a-okvqa
mmmu real-world-qa math-vista count-bench-qa point-bench muir-bench mmiu blink screen-spot-v2 screen-spot-pro os-world-g
llava-video-academic perception-test next-qa mvbench tomato motion-bench temp-compass temporal-bench ego-schema
video-mme long-video-bench lvbench mlvu video-eval-pro molmo2-cap-eval molmo2-video-count-eval molmo2-video-point-eval
mevis ref-yt-vos molmo2-video-track-eval ref-davis17 reason-vos
""".split()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Raw data of a few examples a set, and a small random model."""
    raw = tmp_path_factory.mktemp("runs") / "raw"
    for one in SETS:
        make_set(one, raw, seed=0, scale=0.004, progress=lambda made, total: iter(made))
    train_demo_tokenizer(texts(raw), raw / "tokenizer", PRESETS["tiny"].text.vocab_size)
    settings = ProcessorSettings(preset="tiny", tokenizer_dir=str(raw / "tokenizer"), stage="eval", num_variants=1)
    model = Molmo2(PRESETS["tiny"]).init_weights(0).eval()
    return raw, Subject(model=model, processor=build_processor(settings), device=torch.device("cpu"), batch_size=2)


def test_every_published_evaluation_has_a_benchmark_or_a_reason():
    asked = [one for name, suite in SUITES.items() if name != "demo" for one in suite.benchmarks]
    assert len(PUBLISHED) == 44
    twice = {"a-okvqa-da"}  # a row of its own over the data of a-okvqa
    assert {one.dataset for one in asked} | set(WITHOUT) == set(PUBLISHED) | twice
    assert not {one.dataset for one in asked} & set(WITHOUT)
    names = [one.name for suite in SUITES.values() for one in suite.benchmarks]
    assert len(names) == len(set(names))
    assert set(names) & set(SUITES) == {"pointing"}  # the demo's own, which only "demo" asks
    assert [suite.catalog for suite in choose("pointing")] == ["molmo2-eval"]
    assert all("," not in name for name in names)


def test_suites_and_single_names_mix():
    (multi, video) = choose("next-qa, multi-image")
    assert [one.name for one in multi.benchmarks] == ["muir-bench", "mmiu", "blink"]
    assert [one.name for one in video.benchmarks] == ["next-qa"]
    assert [one.name for one in choose("video,next-qa")[0].benchmarks] == [b.name for b in SUITES["video"].benchmarks]
    with pytest.raises(ValueError, match="use --loss pixmo-cap"):
        choose("pixmo-cap")
    with pytest.raises(ValueError, match="unknown; suites: demo, image"):
        choose("nextqa")


def test_ranks_share_the_questions_and_give_the_answers_of_one(demo, tmp_path):
    raw, subject = demo
    arguments = (DEMO, CATALOG, raw, subject)
    alone = evaluate(*arguments, tmp_path / "1", "d", limit=4)
    for rank in (2, 1, 0):  # rank 0 last: it gathers
        shared = evaluate(*arguments, tmp_path / "3", "d", limit=4, ranks=Ranks(rank=rank, world=3))
        assert (shared.results == []) == (rank != 0)
    assert shared.results == alone.results
    files = (tmp_path / "3").glob("image-QA-*/rank-*.jsonl")
    assert sorted(len(path.read_text().splitlines()) for path in files) == [1, 1, 2]


def test_what_is_answered_is_not_asked_again(demo, tmp_path, monkeypatch):
    raw, subject = demo
    first = evaluate(DEMO, CATALOG, raw, subject, tmp_path, "d", limit=4)
    path = next(tmp_path.glob("image-QA-*/rank-00000.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # killed in the third answer
    asked = []
    processor = subject.processor
    monkeypatch.setattr("molmo2.eval.runner.generate", _counted(asked))
    again = evaluate(DEMO, CATALOG, raw, subject, tmp_path, "d", limit=4)
    assert len(asked) == 2
    assert again == first
    assert subject.processor is processor
    evaluate(DEMO, CATALOG, raw, subject, tmp_path, "other weights", limit=4)
    assert len(asked) == 2 + 4 * len(DEMO.benchmarks)


def _counted(asked):
    from molmo2.model.generate import generate

    def counted(model, prompts, *rest):
        asked.extend(prompts)
        return generate(model, prompts, *rest)

    return counted


def test_missing_data_are_skipped_with_what_to_do(demo, tmp_path):
    raw, subject = demo
    here = tmp_path / "raw"
    here.mkdir()
    (here / "demo-image-qa").symlink_to(raw / "demo-image-qa")
    outcome = evaluate(DEMO, CATALOG, here, subject, tmp_path / "a", "d", limit=1)
    assert [result["name"] for result in outcome.results] == ["image QA"]
    assert set(outcome.skipped) == {"counting", "pointing at all", "pointing", "video QA"}
    assert "no such folder" in outcome.skipped["counting"] and "make demo" in outcome.skipped["counting"]


def test_columns_of_a_row_need_a_row_for_each_example(demo):
    raw, _ = demo
    (row,) = CATALOG.select("eval", ["demo-points"])
    (found,) = questions(row, raw, {"marks": "boxes"}, 1)
    assert list(found.row) == ["marks"]
    grouped = CATALOG.select("eval", ["demo-count"])[0].model_copy(update={"group_by": "label"})
    with pytest.raises(ValueError, match=r"rows make one example.*boxes"):
        questions(grouped, raw, {"marks": "boxes"})


def test_rows_left_out_are_counted(demo, tmp_path):
    raw, subject = demo
    (row,) = CATALOG.select("eval", ["demo-image-qa"])
    answers = [example.annotations[0].answer for example, _ in read_examples(row, raw)]
    rule = Filter(column="qa_pairs.answer", op="not_in", value=[[answers[0]]])
    catalog = CATALOG.model_copy(update={"rows": (row.model_copy(update={"filters": (rule,)}),)})
    suite = replace(DEMO, benchmarks=DEMO.benchmarks[:1])
    (result,) = evaluate(suite, catalog, raw, subject, tmp_path, "d").results
    assert result["num_left_out"] == answers.count(answers[0])
    assert result["num_left_out"] + result["num_questions"] == len(answers)
    assert all("filter: qa_pairs.answer" in reason for reason in result["left_out"])


def test_an_unknown_dataset_of_a_loss_is_refused_first(monkeypatch):
    """Before the model is opened: there is none of that name."""
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", "no-such-run", "--loss", "demo-cap"])
    with pytest.raises(SystemExit, match="--loss demo-cap: no evaluation row in demo"):
        runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    store = Store.of(tmp_path, "x y", {"a": 1})
    assert store.folder != Store.of(tmp_path, "x y", {"a": 2}).folder
    with store.writer(3) as write:
        write(Line("q1", "ü\n"))
    assert store.take(["q1"]) == ["ü\n"]
    with pytest.raises(ValueError, match=r"1 answers are missing \(q2"):
        store.take(["q1", "q2"])
    path = store.folder / "rank-00003.jsonl"
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match=r"rank-00003.jsonl, line 1"):
        store.read()


def test_digest_of_weights():
    one = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = weights_digest({name: one[name] for name in ("b", "a")})
    assert weights_digest(one) == same
    assert weights_digest({**one, "a": torch.tensor([0, 1, 2.5])}) != same
    assert weights_digest({**one, "a": one["a"].view(3, 1)}) != same


@pytest.mark.parametrize("name", ["demo-image-qa", "demo-video-qa"])
def test_loss_is_the_mean_over_all_weights_whatever_the_ranks(demo, tmp_path, name):
    """Held to cross entropy of the model's own logits, weighted token by token."""
    raw, subject = demo
    for rank in (1, 0):
        ranks = Ranks(rank=rank, world=2)
        found = held_out_loss(name, CATALOG, raw, subject, tmp_path, "d", limit=3, ranks=ranks)
    (row,) = CATALOG.select("eval", [name])
    total = weight = 0.0
    for example, _ in list(read_examples(row, raw))[:3]:
        b = as_batch(subject.processor.layout, subject.processor(example, CATALOG.stages["eval"].limits))
        with torch.no_grad():
            logits = subject.model(b.input_ids, b.position_ids, b.segment_ids, b.is_visual, b.pixels, b.pooling)
        kept = b.loss_weights > 0  # elsewhere a label may be a visual token, which no logit is for
        each = -logits[kept].float().log_softmax(-1).gather(-1, b.labels[kept][:, None])[:, 0]
        total += float((each * b.loss_weights[kept]).sum())
        weight += float(b.loss_weights.sum())
    assert (found["num_examples"], found["num_rejected"]) == (3, 0)
    assert found["weight"] == pytest.approx(weight)
    assert found["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_the_tool_on_two_ranks(demo, tmp_path, monkeypatch):
    """torchrun, plain python and a second start: the same results; JSON and a page without links."""
    raw, subject = demo
    weights = dict(subject.model.state_dict())
    export_model(PRESETS["tiny"], weights, raw / "tokenizer", tmp_path / "model", About(origin={"run": "t"}))
    tool = ["tools/evaluate.py", "--checkpoint", tmp_path / "model", "--raw", raw, "--limit", "3", "--device", "cpu"]
    chosen = ["--benchmarks", "counting,mmiu", "--loss", "demo-image-qa"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(command, out):
        whole = [*command, *tool, *chosen, "--out", tmp_path / out / "e.json"]
        run = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        return json.loads((tmp_path / out / "e.json").read_text()), run.stdout

    two, said = start(launch, "two")
    one, _ = start([sys.executable], "one")
    for key in ("results", "skipped"):
        assert two[key] == one[key]
    assert one["losses"][0]["loss"] == pytest.approx(two["losses"][0]["loss"])
    assert [result["name"] for result in two["results"]] == ["counting"]
    assert list(two["skipped"]) == ["mmiu"] and "skipped mmiu" in said
    page = (tmp_path / "two/e.html").read_text()
    assert "counting: the worst answers" in page and "data:image/png" in page and "http" not in page
    monkeypatch.setattr(sys, "argv", [*map(str, tool), "--benchmarks", "tracking"])
    with pytest.raises(SystemExit, match="evaluate: nothing could be asked"):
        runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")


def test_the_page_escapes_what_a_model_says():
    answer = {"key": "a", "prompt": "<i>?", "wanted": "7", "prediction": "<b>", "score": 0.0, "picture": None}
    result = {"name": "x", "metric": "m", "num_questions": 1, "score": 0.0, "chance": None, "corpus": {"cider": 1.5}}
    document = {"checkpoint": "c", "results": [{**result, "worst": [answer]}], "losses": [], "skipped": {"y": "<u>"}}
    page = render_worst("T", document)
    assert "&lt;b&gt;" in page and "&lt;i&gt;?" in page and "&lt;u&gt;" in page
    assert re.search(r"cider \(all answers\).*1\.500", page)
