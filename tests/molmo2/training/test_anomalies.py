"""Losses that are no number or jump, and ranks that are stuck: what is decided, recorded and told."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
import toy_run
from train_runs import log, train

from molmo2.checkpoint.lookup import load_weights
from molmo2.config import Anomalies
from molmo2.training.anomalies import MIN_HISTORY, LossHistory, action_for
from molmo2.training.watchdog import Watchdog

USUAL = [2.0, 2.2, 1.8] * MIN_HISTORY


def test_a_loss_is_judged_by_the_median_of_those_before() -> None:
    settings = Anomalies(spike_factor=2.0)
    assert LossHistory(USUAL).judge(3.9, settings) is None
    assert LossHistory(USUAL).judge(4.1, settings) == "spike"
    assert LossHistory(USUAL).judge(4.1, Anomalies()) is None
    assert LossHistory(USUAL[: MIN_HISTORY - 1]).judge(1e9, settings) is None  # too few to know what is usual
    for loss in (math.nan, math.inf):
        assert LossHistory().judge(loss, settings) == "nonfinite"


def test_skips_in_a_row_are_bounded() -> None:
    history, settings = LossHistory(), Anomalies(nonfinite="skip", max_skips=2)
    for _ in range(2):
        assert action_for("nonfinite", history, settings) == "skip"
        history.add(math.nan, skipped=True)
    assert action_for("nonfinite", history, settings) == "stop"
    history.add(2.0, skipped=False)
    assert action_for("nonfinite", history, settings) == "skip"
    assert list(history.losses) == [2.0]
    assert action_for("spike", history, settings) == "record"
    assert action_for(None, history, settings) == "update"


def test_a_stuck_phase_is_named_with_its_packs(capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    watchdog = Watchdog(3, 0.2, lambda code: ended.set())
    for step in range(5):  # progress keeps it quiet
        watchdog.enter("update", step)
        assert not ended.wait(0.1)
    watchdog.enter("forward", 7, (1, 5))
    assert ended.wait(10)
    told = capfd.readouterr().err
    assert "rank 3 has been in phase 'forward' of step 7" in told
    assert "(packs [1, 5])" in told
    assert "test_anomalies.py" in told  # where the main thread stands


def test_a_watchdog_that_was_stopped_is_silent() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0, 0.1, lambda code: ended.set())
    watchdog.stop()
    assert not ended.wait(0.5)


@pytest.mark.dist
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_spike_can_be_skipped_or_stop_the_run(tmp_path: Path, zero_stage: int) -> None:
    toy_run.build_toy(tmp_path)
    recipe = toy_run.write_recipe(
        tmp_path / "r.yaml",
        "r",
        steps=MIN_HISTORY + 3,
        checkpoint_every=MIN_HISTORY,
        zero_stage=zero_stage,
        packs_per_step=1,
    )
    # A factor just above 1 makes ordinary noise of a loss that has stopped falling a spike.
    still = ["optim.vit.lr=0", "optim.connector.lr=0", "optim.llm.lr=0", "anomalies.spike_factor=1.0001"]
    output = train(tmp_path, recipe, "--set", *still, "anomalies.spike=skip", "anomalies.max_skips=9", ranks=1)
    lines = [json.loads(line) for line in (tmp_path / "runs/r/anomalies.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in log(tmp_path, "r") if line.get("skipped")]
    assert skipped and [line["step"] for line in lines] == skipped
    assert all(
        line["kind"] == "spike" and line["action"] == "skip" and step > MIN_HISTORY
        for line, step in zip(lines, skipped, strict=True)
    )
    assert lines[0]["packs"][0][0].startswith("toy/000000/")
    assert f"step {skipped[0]}: spike" in output
    if zero_stage == 1:
        output = train(tmp_path, recipe, "--set", *still, "train.steps=99", "anomalies.spike=stop", ranks=1, code=1)
        assert "nothing was updated" in output and "--replay" in output and "Traceback" not in output


@pytest.mark.dist
def test_a_loss_that_is_no_number_stops_before_it_does_harm(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=6, checkpoint_every=2)
    mad = ["optim.llm.lr=1e38", "optim.llm.clip=1e38", "optim.llm.warmup_steps=4"]
    output = train(tmp_path, recipe, "--set", *mad, ranks=1, code=1)
    assert "nonfinite" in output and "Traceback" not in output
    (line,) = [json.loads(line) for line in (tmp_path / "runs/r/anomalies.jsonl").read_text().splitlines()]
    assert (line["kind"], line["action"], line["loss"]) == ("nonfinite", "stop", None)
    recipe = toy_run.write_recipe(tmp_path / "s.yaml", "s", steps=6, checkpoint_every=3)
    output = train(
        tmp_path, recipe, "--set", *mad, "anomalies.nonfinite=skip", "anomalies.max_skips=2", ranks=1, code=1
    )
    actions = [json.loads(line)["action"] for line in (tmp_path / "runs/s/anomalies.jsonl").read_text().splitlines()]
    assert actions == ["skip", "skip", "stop"]


@pytest.mark.dist
def test_every_dataset_has_its_loss_in_the_log(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=2)
    train(tmp_path, recipe, "--set", "train.z_loss=0")
    for line in log(tmp_path, "r"):
        assert line["loss.toy"] == pytest.approx(line["loss"], rel=1e-5)  # it is the only one
    _, weights, _ = load_weights(tmp_path / "runs/r")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
