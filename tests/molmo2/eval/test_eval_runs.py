"""Evaluations as they are run: several ranks, killed and resumed, data that are missing, losses, and the tool."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import demo_eval
import pytest
import torch
from demo_eval import CATALOG, DEMO
from fork_server import python

from molmo2.eval.answers import Line, Store, weights_digest
from molmo2.eval.benchmarks import METRICS, choose, load_suites, suites_of
from molmo2.eval.losses import held_out_loss
from molmo2.eval.questions import as_batch, first_draws, read_samples
from molmo2.eval.runner import Ranks, run_suite
from molmo2.eval.score_tables import scores_page
from molmo2.export.card import About
from molmo2.export.model import export_model
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from shards.catalog import BenchmarkSpec, Filter, load_catalog
from shards.convert.reading import convert, open_rows, read_groups, with_facts
from shards.schema import RejectedError
from shards.stream.dataset import open_dataset

ROOT = Path(__file__).resolve().parents[3]
# Short answers: a random model never ends one by itself.
SHORT = replace(DEMO, benchmarks=tuple(replace(one, max_new_tokens=6) for one in DEMO.benchmarks))

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
    """Shards of a few examples a set, and a small random model."""
    root = tmp_path_factory.mktemp("runs")
    return root, demo_eval.build(root)


def test_every_published_evaluation_has_a_benchmark_or_a_reason():
    suites, without = load_suites(), load_catalog("molmo2-eval").left_out
    asked = [one for name, suite in suites.items() if name != "demo" for one in suite.benchmarks]
    assert len(PUBLISHED) == 44
    twice = {"a-okvqa-da"}  # a row of its own over the data of a-okvqa
    assert {one.dataset for one in asked} | set(without) == set(PUBLISHED) | twice
    assert not {one.dataset for one in asked} & set(without)
    names = [one.name for suite in suites.values() for one in suite.benchmarks]
    assert len(names) == len(set(names))
    assert not set(names) & set(suites)
    assert [suite.catalog for suite in choose("pointing")] == ["molmo2-eval"]
    assert all("," not in name for name in names)


def test_suites_and_single_names_mix():
    (multi, video) = choose("next-qa, multi-image")
    assert [one.name for one in multi.benchmarks] == ["muir-bench", "mmiu", "blink"]
    assert [one.name for one in video.benchmarks] == ["next-qa"]
    assert [one.name for one in choose("video,next-qa")[0].benchmarks] == [
        b.name for b in load_suites()["video"].benchmarks
    ]
    with pytest.raises(ValueError, match=r"pixmo-cap.*no such split is published"):
        choose("pixmo-cap")
    with pytest.raises(ValueError, match=r"unknown; did you mean 'next-qa'\? suites: demo, image"):
        choose("nextqa")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "exact_mach"},
            "row demo-image-qa: benchmark.metric: 'exact_mach' is unknown; did you mean 'exact_",
        ),
        ({"suite": "tracking"}, "row demo-image-qa: benchmark.suite: 'tracking' is unknown; known: demo"),
        ({"corpus": ["exact_match"]}, "row demo-image-qa: benchmark.corpus: 'exact_match' is unknown; known: cider, h"),
    ],
)
def test_a_wrong_name_in_a_benchmark_is_refused(changes, message):
    row = next(row for row in CATALOG.rows if row.name == "demo-image-qa")
    spec = BenchmarkSpec.model_validate({"suite": "demo", "metric": "exact_match", **changes})
    catalog = CATALOG.model_copy(update={"rows": (row.model_copy(update={"benchmark": (spec,)}),)})
    with pytest.raises(ValueError, match=re.escape(message)):
        suites_of("demo", catalog)


def test_every_metric_belongs_to_a_benchmark():
    used = {benchmark.metric.__name__ for suite in load_suites().values() for benchmark in suite.benchmarks}
    assert used == set(METRICS)


@pytest.mark.slow
def test_ranks_share_the_samples_and_give_the_answers_of_one(demo, tmp_path):
    root, subject = demo
    arguments = (SHORT, str(root / "shards"), subject)
    alone = run_suite(*arguments, tmp_path / "1", "d", limit=4)
    for rank in (2, 1, 0):  # rank 0 last: it gathers
        shared = run_suite(*arguments, tmp_path / "3", "d", limit=4, ranks=Ranks(rank=rank, world=3))
        assert (shared.results == []) == (rank != 0)
    assert shared.results == alone.results
    files = (tmp_path / "3").glob("image-QA-*/rank-*.jsonl")
    assert sorted(len(path.read_text().splitlines()) for path in files) == [1, 1, 2]


@pytest.mark.slow
def test_what_is_answered_is_not_asked_again(demo, tmp_path, monkeypatch):
    root, subject = demo
    shards = str(root / "shards")
    first = run_suite(SHORT, shards, subject, tmp_path, "d", limit=4)
    path = next(tmp_path.glob("image-QA-*/rank-00000.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # killed in the third answer
    asked = []
    processor = subject.processor
    monkeypatch.setattr("molmo2.eval.runner.generate", _counted(asked))
    again = run_suite(SHORT, shards, subject, tmp_path, "d", limit=4)
    assert len(asked) == 2
    assert again == first
    assert subject.processor is processor
    run_suite(SHORT, shards, subject, tmp_path, "other weights", limit=4)
    assert len(asked) == 2 + sum(result["num_questions"] for result in first.results)


def test_answers_of_another_precision_are_not_taken(demo, tmp_path, monkeypatch):
    root, subject = demo
    weights = {name: tensor.detach() for name, tensor in subject.model.named_parameters()}
    half = replace(subject, model=Molmo2.for_inference(subject.model.config, weights, "cpu", "bf16"))
    assert (subject.precision, half.precision) == ("fp32", "bf16")
    asked = []
    monkeypatch.setattr("molmo2.eval.runner.generate", _counted(asked))
    for number, each in enumerate((subject, half, half), 1):
        outcome = run_suite(SHORT, str(root / "shards"), each, tmp_path, "d", limit=1)
        assert len(asked) == min(number, 2) * sum(result["num_questions"] for result in outcome.results)


def _counted(asked):
    from molmo2.model.generate import generate

    def counted(model, prompts, *rest):
        asked.extend(prompts)
        return generate(model, prompts, *rest)

    return counted


def test_datasets_that_are_not_built_are_skipped_with_what_to_do(demo, tmp_path):
    root, subject = demo
    here = tmp_path / "shards"
    (here / "eval").mkdir(parents=True)
    (here / "eval/demo-image-qa").symlink_to(root / "shards/eval/demo-image-qa")
    outcome = run_suite(SHORT, str(here), subject, tmp_path / "a", "d", limit=1)
    assert [result["name"] for result in outcome.results] == ["image QA"]
    assert set(outcome.skipped) == {"counting", "pointing at all", "video QA"}
    assert "build_shards.py --catalog demo --stage eval --datasets demo-count" in outcome.skipped["counting"]


def test_a_damaged_sample_ends_the_evaluation(demo, tmp_path):
    """A score over the rest would be of other questions."""
    root, subject = demo
    shutil.copytree(root / "shards/eval/demo-image-qa", tmp_path / "shards/eval/demo-image-qa")
    tar = tmp_path / "shards/eval/demo-image-qa/000000.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    suite = replace(SHORT, benchmarks=SHORT.benchmarks[:1])
    with pytest.raises(ValueError, match=r"demo-image-qa/000000.tar, sample 0 .*checksum .*--repair"):
        run_suite(suite, str(tmp_path / "shards"), subject, tmp_path / "a", "d", limit=2)


def test_facts_are_those_of_the_annotations_own_row(demo):
    """One row, or one for each annotation: then it is clear whose they are."""
    root, _ = demo

    def groups(name, facts):
        (row,) = CATALOG.select("eval", [name])
        row, raw = row.model_copy(update={"facts": facts}), root / "raw" / name
        table = open_rows(row, "eval", raw)
        return list(read_groups(row, "eval", raw, table, table.groups(row.group_by)))

    def check(group, name, say):
        (example,) = convert(group)
        assert [dict(one.facts) for one in example.annotations] == [{name: say(one)} for one in example.annotations]
        return example

    for group in groups("demo-points", {"name": "label"}):
        check(group, "name", lambda one: one.label)
    for group in groups("demo-video-qa", {"said": "Answer"}):
        example = check(group, "said", lambda one: one.answer)
        assert len(group.values) == len(example.annotations) == 2
    with pytest.raises(RejectedError, match=r"2 rows made 3 annotations: whose are the facts said"):
        with_facts(group, replace(example, annotations=example.annotations + example.annotations[:1]))


def test_rows_left_out_are_counted(demo, tmp_path):
    root, subject = demo
    (row,) = CATALOG.select("eval", ["demo-image-qa"])
    answers = [question.asked.answer for question in demo_eval.questions(root / "shards", row.name)]
    rule = Filter(column="qa_pairs.answer", op="not_in", value=[[answers[0]]])
    demo_eval.build_row(row.model_copy(update={"filters": (rule,)}), root / "raw", tmp_path)
    suite = replace(SHORT, benchmarks=SHORT.benchmarks[:1])
    (result,) = run_suite(suite, str(tmp_path), subject, tmp_path / "a", "d").results
    assert result["num_left_out"] == answers.count(answers[0])
    assert result["num_left_out"] + result["num_questions"] == len(answers)
    assert all("filter: qa_pairs.answer" in reason for reason in result["left_out"])


def evaluate(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")


def test_an_unknown_dataset_of_a_loss_is_refused_first(monkeypatch, tmp_path):
    """Before the model is opened: there is none of that name."""
    with pytest.raises(SystemExit, match=r"--loss demo-cap: no evaluation row in demo.* nor built in .*/eval; rows: "):
        evaluate(monkeypatch, "--checkpoint", "no-such-run", "--loss", "demo-cap", "--shards", tmp_path)


@pytest.mark.parametrize("name", sorted(load_catalog("molmo2-eval").left_out))
@pytest.mark.parametrize("flag", ["--benchmarks", "--loss"])
def test_a_published_dataset_without_a_row_is_refused_with_its_reason(monkeypatch, tmp_path, flag, name):
    reason = load_catalog("molmo2-eval").left_out[name]
    with pytest.raises(SystemExit, match=f"{flag} '?{name}'?: {re.escape(reason)}"):
        evaluate(monkeypatch, "--checkpoint", "no-such-run", flag, name, "--shards", tmp_path)
    assert "--" not in reason or name in LOSSES  # their advice is followed by the next test


# the datasets of Molmo2 of which it evaluates the loss
LOSSES = ("llava-video-academic", "pixmo-ask-model-anything", "pixmo-cap")
MINE = """
preset: 4b
tokenizer: tokenizer
stages: {sft: {num_variants: 1, examples_per_shard: 8, limits: {sequence_length: 4096, max_crops: 6}}}
rows: [{name: NAME, stages: [sft], files: {train: a.jsonl}, converter: chat, columns: {messages: messages},
  options: {style: user_qa}, HELD_OUT}]
folders: {NAME: {download: {kind: none}}}
"""


@pytest.mark.parametrize("name", LOSSES)
def test_the_advice_of_a_reason_leads_to_a_loss(monkeypatch, tmp_path, name):
    """`held_out: 1 %` in a catalog of one's own, --catalog and --loss: only the model is missing then."""
    reason = load_catalog("molmo2-eval").left_out[name]
    (key,) = re.findall("`(.+?)`", reason)
    assert {"--catalog", "--loss"} <= set(reason.replace(",", " ").split())
    (tmp_path / "mine.yaml").write_text(MINE.replace("NAME", name).replace("HELD_OUT", key))
    with pytest.raises(SystemExit, match="no-such-run"):
        evaluate(monkeypatch, "--checkpoint", "no-such-run", "--catalog", tmp_path / "mine.yaml", "--loss", name)


def test_the_list_has_every_benchmark_and_what_is_built(demo, monkeypatch, capsys):
    root, _ = demo
    with pytest.raises(SystemExit) as ended:
        evaluate(monkeypatch, "--list", "--shards", root / "shards")
    assert not ended.value.code
    lines = {tuple(re.split("  +", line)) for line in capsys.readouterr().out.splitlines()}
    assert ("demo", "counting", "count_exact", "demo-count", "built") in lines
    assert (
        "video",
        "molmo2-cap-eval",
        "rouge_l, cider, statement_f1 (--judge)",
        "molmo2-cap-eval",
        "not built",
    ) in lines
    assert len(lines) == 1 + sum(len(suite.benchmarks) for suite in load_suites().values())


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
    root, subject = demo
    for rank in (1, 0):
        ranks = Ranks(rank=rank, world=2)
        found = held_out_loss(name, "demo", str(root / "shards"), subject, tmp_path, "d", limit=3, ranks=ranks)
    dataset = open_dataset(str(root / "shards/eval"), name)
    total = weight = 0.0
    for draw, stored in read_samples(dataset.tars, first_draws(dataset, 3)):
        b = as_batch(subject.processor.layout, draw, stored)
        with torch.no_grad():
            logits = subject.model(b.input_ids, b.position_ids, b.segment_ids, b.is_visual, b.pixels, b.pooling)
        kept = b.loss_weights > 0  # elsewhere a label may be a visual token, which no logit is for
        each = -logits[kept].float().log_softmax(-1).gather(-1, b.labels[kept][:, None])[:, 0]
        total += float((each * b.loss_weights[kept]).sum())
        weight += float(b.loss_weights.sum())
    assert (found["num_samples"], found["num_left_out"]) == (3, 0)
    assert found["weight"] == pytest.approx(weight)
    assert found["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.slow
def test_the_tool_on_two_ranks(demo, tmp_path, monkeypatch):
    """torchrun, plain python and a second start: the same results; JSON and a page without links."""
    root, subject = demo
    weights = dict(subject.model.state_dict())
    export_model(PRESETS["tiny"], weights, root / "raw/tokenizer", tmp_path / "model", About(origin={"run": "t"}))
    tool = ["tools/evaluate.py", "--checkpoint", tmp_path / "model", "--shards", root / "shards"]
    tool += ["--limit", "2", "--device", "cpu"]
    chosen = ["--benchmarks", "counting,mmiu", "--loss", "demo-image-qa"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(command, out):
        whole = [*command, *tool, *chosen, "--out", tmp_path / out / "e.json"]
        run = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        return json.loads((tmp_path / out / "e.json").read_text()), run.stdout

    two, said = start(launch, "two")
    one, _ = start([python()], "one")
    for key in ("results", "skipped"):
        assert two[key] == one[key]
    assert one["losses"][0]["loss"] == pytest.approx(two["losses"][0]["loss"])
    assert [result["name"] for result in two["results"]] == ["counting"]
    assert list(two["skipped"]) == ["mmiu"] and "skipped mmiu" in said
    page = (tmp_path / "two/e.html").read_text()
    assert "counting: the worst answers" in page and "data:image/png" in page and "http" not in page
    monkeypatch.setattr(sys, "argv", [*map(str, tool), "--benchmarks", "tracking"])
    with pytest.raises(SystemExit, match="evaluate: nothing was evaluated"):
        runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")


def test_the_page_escapes_what_a_model_says():
    answer = {"key": "a", "prompt": "<i>?", "wanted": "7", "prediction": "<b>", "score": 0.0, "picture": None}
    result = {"name": "x", "metric": "m", "num_questions": 1, "score": 0.0, "chance": None, "corpus": {"cider": 1.5}}
    document = {"checkpoint": "c", "results": [{**result, "worst": [answer]}], "losses": [], "skipped": {"y": "<u>"}}
    page = scores_page("T", document)
    assert "&lt;b&gt;" in page and "&lt;i&gt;?" in page and "&lt;u&gt;" in page
    assert re.search(r"1\.500.*cider \(all answers\)", page)
