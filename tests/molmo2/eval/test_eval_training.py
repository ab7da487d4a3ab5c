"""Scores of benchmarks during training: the answers of `tools/evaluate.py`, on any ranks, and what a run writes."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.distributed as dist
import toy_run
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import train

from molmo2.config import RecipeError, load_recipe
from molmo2.eval import during_training
from molmo2.eval.benchmarks import own_suite
from molmo2.eval.during_training import Scorer
from molmo2.eval.metrics.scores import Answered, Score
from molmo2.eval.runner import Subject, run_suite
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import SINGLE
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from molmo2.train import main
from molmo2.training.prepare import prepare
from molmo2.training.run import Run
from shards.build.builder import build_dataset
from shards.catalog import load_catalog

ROOT = Path(__file__).resolve().parents[3]
CATALOG = """
preset: tiny
tokenizer: tokenizer
stages: {sft: {num_variants: 1, examples_per_shard: 8, limits: {sequence_length: 192, max_crops: 6, image_crops: 2}}}
rows:
  - name: mine
    stages: [sft]
    files: {train: rows.jsonl}
    held_out: 40 %
    benchmark: {suite: demo, metric: exact_match, corpus: [cider, statement_f1], max_new_tokens: 7}
    converter: image_qa
    columns: {image: image, question: question, answer: answer}
    options: {style: text_vqa}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of both stages of one dataset, and its catalog."""
    root = tmp_path_factory.mktemp("scored")
    (root / "raw/mine").mkdir(parents=True)
    rows = [{"image": f"{n}.png", "question": f"How many is {n}?", "answer": f"{n}."} for n in range(30)]
    for n, row in enumerate(rows):
        PIL.Image.new("RGB", (40, 30 + n), "red").save(root / "raw/mine" / row["image"])
    (root / "raw/mine/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toy_run.make_tokenizer(root / "raw/tokenizer")
    (root / "mine.yaml").write_text(CATALOG)
    catalog = load_catalog(str(root / "mine.yaml"))
    for stage in ("sft", "eval"):
        make = functools.partial(build_processor, settings_of(root, stage))
        out = root / "shards" / stage / "mine"
        build_dataset(catalog.rows[0], stage, catalog.stages[stage], make, raw=root / "raw/mine", out=out)
    return root


def settings_of(root: Path, stage: str) -> ProcessorSettings:
    return ProcessorSettings(preset="tiny", tokenizer_dir=str(root / "raw/tokenizer"), stage=stage, num_variants=1)


def write_recipe(root: Path, name: str, **evaluation: Any) -> Path:
    path = toy_run.write_recipe(root / f"{name}.yaml", Path(name).name, steps=4, checkpoint_every=100)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["mixture"] = {"groups": {"all": {"rate": 1, "datasets": {"mine": None}}}}
    recipe["eval"] = {"roots": ["shards/eval"], "datasets": ["mine"], "every": 2, "samples": 0}
    recipe["eval"] |= {"benchmarks": ["mine"], "catalog": str(root / "mine.yaml"), "questions": 5, **evaluation}
    recipe["logging"] = {"tensorboard": True}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def one_rank(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process group of this process alone."""
    monkeypatch.setenv("MOLMO2_DATA", str(root))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield root
    dist.destroy_process_group()


def open_run(path: Path, *overrides: str) -> Run:
    return prepare(load_recipe(path, overrides), SINGLE, torch.device("cpu"))


def spelled(text: str, asked: Any, facts: Any) -> Score:
    """A score that depends on every letter of an answer."""
    return Score(sum(map(ord, text)) % 97 / 97)


def in_order(answers: Sequence[Answered]) -> float:
    """A score of all answers that depends on which answer belongs to which question."""
    return float(sum(n * sum(map(ord, answer.prediction)) for n, answer in enumerate(answers, 1)) % 97)


@pytest.mark.parametrize("stage", [1, 3])
def test_scores_are_those_of_evaluate(one_rank: Path, tmp_path: Path, stage: int) -> None:
    run = open_run(write_recipe(one_rank, f"equal{stage}"), f"train.zero_stage={stage}")
    model = Molmo2(PRESETS["tiny"]).init_weights(3).eval()
    suite = own_suite(str(one_rank / "mine.yaml"))
    corpus = (*suite.benchmarks[0].corpus, in_order)
    suite = replace(suite, benchmarks=tuple(replace(one, metric=spelled, corpus=corpus) for one in suite.benchmarks))
    processor = build_processor(settings_of(one_rank, "eval"))
    subject = Subject(model=model, processor=processor, device=torch.device("cpu"))
    (result,) = run_suite(suite, str(one_rank / "shards"), subject, tmp_path, "d", limit=5).results
    scorer = Scorer(run)
    scorer.benchmarks = tuple(replace(one, benchmark=suite.benchmarks[0]) for one in scorer.benchmarks)
    assert result["num_questions"] == 5 and result["score"] > 0
    assert result["corpus"].keys() == {"cider", "in_order"}
    expected = {"score.mine": result["score"]} | {f"score.mine.{name}": v for name, v in result["corpus"].items()}
    assert scorer(model) == pytest.approx(expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_right_answers_score_and_damaged_samples_are_left_out(
    one_rank: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Two of five are right; text after the end-of-text token, which ZeRO-3 generates, does not count."""
    run = open_run(write_recipe(one_rank, f"right{stage}"), f"train.zero_stage={stage}")
    scorer = Scorer(run)
    right = [question.asked.answer for question in scorer.benchmarks[0].questions]
    replies = iter([right[0], right[1], "no", "no", "no", right[0]])
    tokenizer = run.tokenizer

    def reply(model: Any, prompts: Any, max_new_tokens: int, end: int) -> list[list[int]]:
        ids = tokenizer.encode(next(replies))
        return [ids if end == tokenizer.eos else [*ids, tokenizer.eos, *tokenizer.encode("more")]]

    monkeypatch.setattr(during_training, "generate", reply)
    model = Molmo2(PRESETS["tiny"])
    scores = scorer(model)
    assert scores["score.mine"] == pytest.approx(2 / 5) and scores["score.mine.cider"] > 0
    read, calls = during_training.read_prompt, []

    def damaged(*arguments: Any) -> Any:
        calls.append(arguments)
        return read(*arguments) if len(calls) == 1 else None

    monkeypatch.setattr(during_training, "read_prompt", damaged)
    assert scorer(model)["score.mine"] == 1.0 and len(calls) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["mien"]}, "eval.benchmarks 'mien': no row of .* did you mean 'mine'"),
        (
            {"benchmarks": ["chart-qa"], "catalog": None},
            r"(?s)in none of eval.roots \(.*--datasets chart-qa",
        ),
        ({"benchmarks": ["chart-aq"], "catalog": None}, "eval.benchmarks 'chart-aq': unknown"),
    ],
)
def test_wrong_benchmarks_are_refused_at_the_start(one_rank: Path, changes: dict[str, Any], message: str) -> None:
    run = open_run(write_recipe(one_rank, "wrong", **changes))
    with pytest.raises(ValueError, match=message):
        Scorer(run)
    with pytest.raises(RecipeError, match="questions"):
        load_recipe(write_recipe(one_rank, "none", questions=0))


def test_scores_that_need_a_judge_are_named_at_the_start(one_rank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Scorer(open_run(write_recipe(one_rank, "judged")))
    line = "eval.benchmarks: statement_f1 of mine needs a judge and is not computed during training; run tools/evaluate"
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_a_look_at_a_recipe_checks_its_benchmarks(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown names are refused with the nearest one; a dataset to build is named with its command."""
    monkeypatch.setenv("MOLMO2_DATA", str(root))

    def look(flag: str, **changes: Any) -> tuple[int, str, str]:
        code = main(["--recipe", str(write_recipe(root, "look", **changes)), flag])
        return code, *capsys.readouterr()

    unknown, unbuilt = {"benchmarks": ["chart-aq"], "catalog": None}, {"benchmarks": ["chart-qa"], "catalog": None}
    for flag in ("--dry-run", "--inspect"):
        code, _, errors = look(flag, **unknown)
        assert code == 1 and "recipe look: eval.benchmarks 'chart-aq': unknown; did you mean 'chart-qa'? " in errors
        code, _, errors = look(flag, benchmarks=["mien"])
        assert code == 1 and "recipe look: eval.benchmarks 'mien': no row of " in errors and "'mine'" in errors
    command = "python tools/build_shards.py --catalog molmo2-eval --stage eval --datasets chart-qa"
    code, output, _ = look("--dry-run", **unbuilt)
    assert code == 0 and "eval.benchmarks: chart-qa is in none of eval.roots" in output and command in output
    code, _, errors = look("--inspect", **unbuilt)
    assert code == 1 and "eval.benchmarks: chart-qa is in none of eval.roots" in errors and command in errors
    code, output, _ = look("--dry-run")
    assert code == 0 and "eval.benchmarks" not in output
    code, output, _ = look("--inspect")
    assert code == 0 and "benchmarks at each validation: mine (5 questions)" in output


@pytest.mark.dist
def test_a_wrong_benchmark_of_a_later_stage_stops_the_first(root: Path) -> None:
    folder = root / "stages"
    folder.mkdir()
    for number, benchmark in enumerate(("mine", "mien"), 1):
        write_recipe(root, f"stages/stage{number}", benchmarks=[benchmark])
    output = train(root, folder / "stage1.yaml", "--all-stages", ranks=1, code=1)
    assert "eval.benchmarks 'mien'" in output and not list((root / "runs").glob("*stage1/log.jsonl"))


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_on_two_ranks_writes_its_scores(root: Path, stage: int) -> None:
    train(root, write_recipe(root, f"run{stage}"), "--set", f"train.zero_stage={stage}")
    run_dir = root / f"runs/run{stage}"
    lines = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(0 <= line["score.mine"] <= 1 and "loss.mine" in line for line in lines)
    assert all(0 <= line["score.mine.cider"] <= 10 for line in lines)
    assert "held-out score.mine by step" in (run_dir / "report.html").read_text()
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out/score/mine")] == [0, 2, 4]
