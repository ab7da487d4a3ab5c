"""The log of a run: every step once, whatever happened, and the same numbers in TensorBoard."""

import importlib.machinery
import json
import math
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from molmo2.config import Recipe, load_recipe
from molmo2.model.mask import PAD_SEGMENT, allowed
from molmo2.model.pairs import attention_pairs
from molmo2.parallel.mesh import SINGLE
from molmo2.training.cost import batch_flops, speed
from molmo2.training.metrics import (
    Monitor,
    bar_text,
    cut_log,
    gpu_use,
    read_log,
)
from molmo2.training.prepare import prepare
from molmo2.training.run import LOG_NAME
from molmo2.training.summary import summarize_run
from shards.stream.loader import pack_reader
from shards.stream.plan import Cursor
from shards.stream.read_ahead import MicroSpec
from shards.stream.reader import Damage

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo/stage1.yaml"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    recipe = load_recipe(DEMO, ["train.steps=4", "logging.tensorboard=true", "train.log_every=2"])
    recipe.run_dir.mkdir(parents=True)
    return recipe


def line(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr.vit": 0.1 * step,
        "tokens": 100,
        "tokens_per_second": 50.0,
        "tflops": 0.25,
        "group_loss.text": loss,
        "data_wait": 0.1,
        "fill": 0.9,
        "seconds": 2.0,
    }


def test_every_step_stands_once_after_a_restart(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.run_dir / LOG_NAME
    first = Monitor(recipe, 0)
    for step in (1, 2, 3):
        first.step(line(step, 10.0 - step))
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 3]
    cut_log(path, 2)
    second = Monitor(recipe, 2)
    for step in (3, 4):
        second.step(line(step, 5.0 - step))
    second.close()
    assert [(entry["step"], entry["loss"]) for entry in read_log(path)] == [(1, 9.0), (2, 8.0), (3, 2.0), (4, 1.0)]
    shown = capsys.readouterr().err
    assert re.search(
        r"step 4/4 \[\d\d:\d\d, ETA 00:00, loss 1\.0000 \| lr 4\.00e-01 \| 50 tok/s \| 0\.25 TFLOP/s", shown
    )
    lines = [text for text in shown.split("\n") if "step" in text]
    # Lines, for this is no terminal: the first step after each start, every second one, and the last.
    assert [re.search(r"demo-stage1: step (\d)/4", text)[1] for text in lines] == ["1", "2", "3", "4"]
    assert "\r" not in shown
    events = EventAccumulator(str(recipe.run_dir / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *("train/loss", "train/lr/vit", "train/group_loss/text", "data/tokens", "data/fill"),
        *("time/tokens_per_second", "time/tflops", "time/data_wait", "time/seconds"),
    }
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 9.0),
        (2, 8.0),
        (3, 2.0),
        (4, 1.0),
    ]


def test_progress_is_a_bar_on_a_terminal_and_about_a_hundred_lines_elsewhere(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = recipe.train.model_copy(update={"steps": 1000})
    recipe = recipe.model_copy(
        update={"train": train, "logging": recipe.logging.model_copy(update={"tensorboard": False})}
    )
    monitor = Monitor(recipe, 500)
    for step in range(501, 1001):
        monitor.step(line(step, 1.0))
    monitor.close()
    shown = re.findall(r"^demo-stage1: step (\d+)/1000 \[", capsys.readouterr().err, re.MULTILINE)
    assert [int(step) for step in shown] == [501, *range(510, 1001, 10)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monitor = Monitor(recipe, 998)
    for step in (999, 1000):
        monitor.step(line(step, 1.0))
    monitor.close()
    bar = capsys.readouterr().err
    assert "100%|" in bar and "\r" in bar and bar.rstrip().endswith("]") and "step 1000/1000 [" in bar


@pytest.mark.slow
def test_wandb_without_a_network_has_every_number_and_the_samples(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    logging = recipe.logging.model_copy(update={"wandb": "project", "tensorboard": False})
    monitor = Monitor(recipe.model_copy(update={"logging": logging}), 0)
    for step in (1, 2):
        monitor.step(line(step, 3.125 - step))
    monitor.plot(2, {"held_out.loss": 4.625})
    monitor.show(2, 0, "an answer", Image.new("RGB", (4, 4)))
    monitor.show(2, 1, "text <alone>")
    monitor.close()
    (path,) = recipe.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    # Protobuf: names and JSON values stand in it as they are. W&B's own process may write it just after `finish`.
    wanted = (
        *(b"train/loss", b"train/lr/vit", b"2.125", b"1.125", b"train/group_loss/text", b"held_out/loss", b"4.625"),
        *(b"held_out/samples/0", b"an answer", b"held_out/samples/1"),
    )
    end = time.monotonic() + 20
    while (missing := [each for each in wanted if each not in path.read_bytes()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not missing
    (page,) = recipe.run_dir.glob("wandb/offline-run-*/files/media/html/held_out/samples/1_2_*.html")
    assert "<pre>text &lt;alone&gt;</pre>" in page.read_text()


def test_the_bar_shows_mfu_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    values = line(1, 2.0)
    assert bar_text(values | {"working_share": 0.875, "tflops": 0.5}).endswith("wait 10% | ranks work 88%")
    assert bar_text(values | speed(4e12, 2.0, 4, 2.0)) == "loss 2.0000 | lr 1.00e-01 | 50 tok/s | MFU 25.0% | wait 10%"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 NVL")
    assert speed(1e15, 1.0, 1, None) == {"tflops": 1000.0, "mfu": pytest.approx(1000 / 989)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert speed(1e15, 1.0, 1, None) == {"tflops": 1000.0}


def test_a_batch_counts_its_own_pairs_on_the_host(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("toy")
    toy_run.build_toy(root)
    monkeypatch.setenv("MOLMO2_DATA", str(root))
    run = prepare(load_recipe(toy_run.write_recipe(root / "r.yaml", "r")), SINGLE, torch.device("cpu"))
    step = run.plan.step(Cursor())
    reader = pack_reader(run.plan, run.layout)
    batch = reader.read(MicroSpec(step.packs, step.divisor, step.cursor))
    padding = int((batch.segment_ids == PAD_SEGMENT).sum())
    assert padding and len(batch.pixels)
    assert batch.work.pairs == int(allowed(batch.segment_ids, batch.is_visual).sum()) - padding
    assert batch.work.pairs == attention_pairs(batch.segment_ids, batch.is_visual)
    assert batch.work[::2] == (len(batch.pixels), int((batch.loss_weights > 0).sum()))
    sizes = [pack.sizes for pack in step.packs]  # from the index alone
    assert (sum(size.crops for size in sizes), sum(size.pairs for size in sizes)) == batch.work[:2]
    draw = step.packs[0].draws[0]
    spec = MicroSpec(step.packs, step.divisor, step.cursor)
    damage = Damage(dataset="toy", shard="000000", row=draw.row, key=None, offset=draw.offset, reason="cut")
    less = reader.without(spec, [damage])
    assert less.masked and less.work.pairs == attention_pairs(less.segment_ids, less.is_visual) < batch.work.pairs
    assert batch_flops(less, run.model_config, ()) < batch_flops(batch, run.model_config, ())


def test_a_gpu_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_use() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 29)
    binding = types.ModuleType("pynvml")
    binding.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    binding.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 87)
    assert gpu_use() == {"gpu_memory_gib": 1.5, "gpu_utilization": 87.0}

    def refused() -> int:
        raise binding.NVMLError

    monkeypatch.setattr(torch.cuda, "utilization", refused)
    assert gpu_use() == {"gpu_memory_gib": 1.5}


def test_what_is_no_number_is_null_in_the_log(recipe: Recipe) -> None:
    monitor = Monitor(recipe, 0)
    monitor.step(line(1, math.nan))
    monitor.close()
    text = (recipe.run_dir / LOG_NAME).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_summary_averages_the_ends_of_the_curve(recipe: Recipe) -> None:
    summary = summarize_run([line(step, float(step)) for step in range(1, 21)], recipe)
    assert (summary["loss_first"], summary["loss_last"]) == (1.5, 19.5)
    assert (summary["steps"], summary["tokens"], summary["seconds"]) == (20, 2000, 40.0)
    with pytest.raises(ValueError, match="it has no steps"):
        summarize_run([], recipe)
