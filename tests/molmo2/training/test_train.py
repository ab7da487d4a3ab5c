"""The trainer as a user starts it: real launchers, two ranks, kills, damaged files, wrong data."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import (
    assert_same_curve,
    branch_off,
    curve,
    launch,
    launch_on_two_machines,
    log,
    ranks_of,
    start,
    train,
    wait_for,
)

from molmo2.checkpoint.lookup import load_weights
from molmo2.config import load_recipe
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.training.cost import pack_cost
from molmo2.training.run import lock_run
from shards.stream.balance import SAME_COST, own_packs
from shards.stream.plan import Cursor, open_plan

TINY = PRESETS["tiny"]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a recipe of 6 steps, and its uninterrupted run on two ranks."""
    root = tmp_path_factory.mktemp("data")
    toy_run.build_toy(root)
    recipe = toy_run.write_recipe(root / "whole.yaml", "whole", steps=6, checkpoint_every=2)
    output = train(root, recipe, "--set", "logging.peak_tflops=0.5")
    assert "whole: 6 steps" in output
    return root


def test_the_run_learns_and_records_every_step(root: Path) -> None:
    lines = log(root, "whole")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert all(0.2 < line["fill"] <= 1 and line["tokens_per_second"] > 0 and line["masked"] == 0 for line in lines)
    assert lines[0]["lr.vit"] == pytest.approx(1.5e-3)
    for line in lines:
        assert sum(count for name, count in line.items() if name.startswith("tokens.")) == line["tokens"]
        assert 0 < line["tflops"] < 0.5 and line["mfu"] == pytest.approx(line["tflops"] / 0.5)
        assert line["group_loss.all"] == pytest.approx(line["loss.toy"])
        assert line["crops"] > 0 and line["megabytes"] > 0 and line["retries"] == line["cache_hits"] == 0
        assert 0 < line["read_ms.p50"] <= line["read_ms.p95"] and 0 < line["decode_ms.p50"] <= line["decode_ms.p95"]
    data = [json.loads(line) for line in (root / "runs/whole/data.jsonl").read_text().splitlines()]
    assert [line["step"] for line in data] == [2, 4, 6]
    assert all(each["masked"] == 0 and each["asked"] > 0 for line in data for each in line["datasets"].values())
    assert sum(each["asked"] for each in data[0]["datasets"].values()) == pytest.approx(1)
    assert sum(each["drawn"] for each in data[0]["datasets"].values()) == pytest.approx(1)  # inside the first window
    assert data[0]["windows"] == 0 and all(each["epochs"] > 0 for each in data[0]["datasets"].values())
    assert min(lines[0][f"grad_norm.{name}"] for name in ("vit", "connector", "llm")) > 0
    summary = json.loads((root / "runs/whole/summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (6, sum(line["tokens"] for line in lines))
    assert summary["loss_first"] > summary["loss_last"]


def test_checkpoints_are_rotated_and_tell_where_they_come_from(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = root / "runs/whole/checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000006"]
    meta = json.loads((directory / "step-00000006/meta.json").read_text())
    assert (meta["step"], meta["world"], meta["sp"], meta["finished"]) == (6, 2, 1, True)
    assert {"torch", "deepspeed", "python"} <= set(meta["versions"])
    recipe = json.loads((directory / "step-00000006/recipe.json").read_text())
    assert recipe["train"]["steps"] == 6
    monkeypatch.setenv("MOLMO2_DATA", str(root))
    config, final, _ = load_weights("whole")
    assert config.name == "tiny"
    _, middle, meta = load_weights(directory / "step-00000004")  # consolidated from DeepSpeed's files
    assert not meta["finished"]
    assert {k: v.shape for k, v in middle.items()} == {k: v.shape for k, v in final.items()}
    assert any((final[name] != middle[name]).any() for name in final)


def test_kill_in_mid_run_then_restart_gives_the_same_curve(root: Path) -> None:
    recipe = toy_run.write_recipe(root / "killed.yaml", "killed", steps=6, checkpoint_every=2)
    process = start(root, recipe)
    wait_for(process, lambda: len(log(root, "killed")) >= 3)
    assert len(ranks_of(process)) == 2
    process.kill()
    assert 3 <= len(log(root, "killed")) < 6
    with open(root / "runs/killed/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line cut short, as a kill leaves it
    output = train(root, recipe)
    assert "killed: steps 3-6" in output or "killed: steps 5-6" in output
    assert curve(root, "killed") == curve(root, "whole")


def test_damaged_checkpoint_is_passed_over(root: Path) -> None:
    run = root / "runs/damaged"
    shutil.copytree(root / "runs/whole", run)
    largest = max((run / "checkpoints/step-00000006").rglob("*.pt"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    unfinished = run / "checkpoints/step-00000099"
    unfinished.mkdir()
    recipe = toy_run.write_recipe(root / "damaged.yaml", "damaged", steps=6, checkpoint_every=2)
    output = train(root, recipe)
    assert f"step-00000006: skipped: {largest.relative_to(run / 'checkpoints/step-00000006')} has " in output
    assert "step-00000099: skipped: no meta.json: it was never finished" in output
    assert "damaged: steps 5-6" in output
    assert curve(root, "damaged") == curve(root, "whole")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "damaged-step-00000099", "step-00000004", "step-00000006"]


def saved_at_the_last_step(root: Path, name: str) -> bool:
    steps = len(log(root, name))
    return steps < 6 and (root / f"runs/{name}/checkpoints/step-{steps:08d}/meta.json").exists()


def test_sigterm_to_a_rank_and_all_workers_saves_and_asks_for_a_new_start(root: Path) -> None:
    recipe = toy_run.write_recipe(root / "stopped.yaml", "stopped", steps=6, checkpoint_every=100)
    process = start(root, recipe)
    wait_for(process, lambda: len(log(root, "stopped")) >= 2)
    ranks = process.ranks()
    for number in (signal.SIGINT, signal.SIGTERM):
        for worker in [worker for rank in ranks for worker in rank.children()]:
            worker.send_signal(number)
    ranks[1].send_signal(signal.SIGTERM)
    assert process.wait(120) == os.EX_TEMPFAIL, process.output.read_text()
    assert "stopped on request (signal) after step" in process.output.read_text()
    assert saved_at_the_last_step(root, "stopped")
    train(root, recipe)
    assert curve(root, "stopped") == curve(root, "whole")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_sigterm_to_the_launchers_of_two_machines_saves(root: Path, launcher: str) -> None:
    """To torchrun itself; to the process group of deepspeed, whose first process passes no signal on."""
    recipe = toy_run.write_recipe(root / f"{launcher}.yaml", launcher, steps=6, checkpoint_every=100)
    machines = launch_on_two_machines(launcher, root, recipe)
    wait_for(machines[0], lambda: len(log(root, launcher)) >= 2)
    for machine in machines:
        if launcher == "torchrun":
            machine.terminate()
        else:
            os.killpg(machine.pid, signal.SIGTERM)
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert all(machine.returncode != 0 for machine in machines), outputs
    assert "on 2 ranks (dp 2, sp 1)" in outputs[0], outputs
    assert "stopped on request (signal) after step" in outputs[0], outputs
    assert saved_at_the_last_step(root, launcher)


@pytest.mark.parametrize("stage", [1, 3])
def test_being_judged_moves_nothing_and_leaves_losses_and_samples(root: Path, stage: int) -> None:
    name = f"judged{stage}"
    recipe = toy_run.write_recipe(root / f"{name}.yaml", name, steps=6, checkpoint_every=100, zero_stage=stage)
    judged = "eval={roots: [shards/sft], datasets: [toy], every: 2, samples: 3, max_new_tokens: 6}"
    train(root, recipe, "--set", judged, "logging.tensorboard=true")
    if stage == 1:
        assert curve(root, name) == curve(root, "whole")
    else:
        assert_same_curve(root, name, "whole", 1e-5)
    lines = [json.loads(line) for line in (root / f"runs/{name}/eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert lines[0]["loss"] == lines[0]["loss.toy"] > lines[1]["loss"] > lines[-1]["loss"] and lines[0]["masked"] == 0
    folder = root / f"runs/{name}/samples/step-00000006"
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 3
    assert {sample["expected"] for sample in samples} <= {*toy_run.COLOURS, "a square"}
    assert all("colour?" in sample["prompt"] or "shape?" in sample["prompt"] for sample in samples)
    pictures = [sample["picture"] for sample in samples if sample["picture"]]
    assert pictures and all((folder / picture).stat().st_size for picture in pictures)
    page = (root / f"runs/{name}/report.html").read_text()
    assert "6 of 6" in page and "held-out loss by step" in page and "data:image/jpeg" in page and "100.0%" in page
    assert f"{lines[0]['loss']:.4f} at step 0, {lines[-1]['loss']:.4f} at step 6" in page
    events = EventAccumulator(str(root / f"runs/{name}/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 2, 4, 6]
    pictured = samples.index(next(sample for sample in samples if sample["picture"]))
    assert [event.step for event in events.Images(f"held_out/samples/{pictured}")]


def test_the_starting_weights_are_judged_once_and_a_repeated_step_has_one_line(root: Path) -> None:
    recipe = toy_run.write_recipe(root / "again.yaml", "again", steps=4, checkpoint_every=2)
    judged = ("--set", "eval={roots: [shards/sft], datasets: [toy], every: 3, samples: 0}", "logging.tensorboard=true")
    run = root / "runs/again"
    assert "again: step 0, held-out loss" in train(root, recipe, *judged)
    before = (run / "eval.jsonl").read_text()
    assert [json.loads(line)["step"] for line in before.splitlines()] == [0, 3, 4]
    shutil.rmtree(run / "checkpoints/step-00000004")
    output = train(root, recipe, *judged)  # as after a kill in step 4
    assert "again: steps 3-4" in output and "step 0, held-out" not in output
    assert (run / "eval.jsonl").read_text() == before
    shutil.rmtree(run / "checkpoints")
    assert "again: step 0, held-out loss" in train(root, recipe, *judged)  # as after a kill in step 1
    assert (run / "eval.jsonl").read_text() == before
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out/loss")] == [0, 3, 4]


def test_a_stop_file_saves_exits_with_zero_and_is_taken_away(root: Path) -> None:
    recipe = toy_run.write_recipe(root / "filed.yaml", "filed", steps=6, checkpoint_every=100)
    file = root / "runs/filed/stop"
    file.parent.mkdir(parents=True)
    file.touch()
    assert "filed: stopped on request (stop file) after step 1 of 6" in train(root, recipe)
    assert not file.exists()
    assert [path.name for path in (root / "runs/filed/checkpoints").iterdir()] == ["step-00000001"]


def test_stages_hand_over_and_finished_ones_are_skipped(root: Path) -> None:
    folder = root / "stages"
    folder.mkdir()
    first = toy_run.write_recipe(folder / "stage1.yaml", "first", steps=8)
    toy_run.write_recipe(folder / "stage2.yaml", "second", init="first", steps=2, sp=2, zero_stage=2)
    process = launch(root, first, "--all-stages", "--check-sp")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "second: steps 1-2" in output
    assert "second: sp 2 agrees with one rank to" in output
    assert "first: sp" not in output
    assert "(dp 1, sp 2)" in output
    assert log(root, "second")[0]["loss"] < 0.9 * log(root, "first")[0]["loss"]
    output = train(root, first, "--all-stages")
    assert "first: finished at step 8; nothing to do" in output
    assert "second: finished at step 2; nothing to do" in output


def test_ranks_sp_and_zero_stage_may_change_between_runs(root: Path) -> None:
    branch_off(root, "moved", "whole", 4)
    recipe = toy_run.write_recipe(root / "moved.yaml", "moved", steps=6, checkpoint_every=1)
    output = train(root, recipe, "--set", "train.zero_stage=3", ranks=1)
    assert "world was 2, is 1, zero_stage was 1, is 3: the checkpoint was converted" in output
    shutil.rmtree(root / "runs/moved/checkpoints/step-00000006")
    output = train(root, recipe, "--set", "train.zero_stage=2", "train.sp=2")
    assert "world was 1, is 2, zero_stage was 3, is 2" in output
    assert_same_curve(root, "moved", "whole", 1e-5)
    names = [path.name for path in (root / "runs/moved/checkpoints").iterdir()]
    assert sorted(names) == ["step-00000005", "step-00000006"]  # the converted copies are gone


def test_losses_are_the_same_whether_packs_are_dealt_by_cost_or_in_their_order(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(root))
    recipe = toy_run.write_recipe(root / "undealt.yaml", "undealt", steps=6)
    train(root, recipe, "--set", "train.pack_cost={token: 0, crop: 0, pair: 0}")
    assert_same_curve(root, "undealt", "whole", 1e-5)
    line = log(root, "whole")[-1]
    assert 0.5 <= line["working_share"] <= 1 and line["slowest_rank"] in {0, 1}
    loaded = load_recipe(recipe)
    plan, cursor, differ = open_plan(loaded.roots, loaded.data.drawn_mixture, loaded.plan_settings), Cursor(), []
    for _ in range(6):
        step = plan.step(cursor)
        by_cost, in_order = (own_packs(step, cost, 256, 0, 2, 1) for cost in (pack_cost(loaded, TINY), SAME_COST))
        differ.append(set(by_cost) != set(in_order))
        cursor = step.cursor
    assert any(differ)  # else nothing was dealt otherwise


def test_a_run_resumes_without_the_weights_from_which_it_began(root: Path) -> None:
    """On other ranks too, where frozen weights are not among the optimizer's."""
    frozen = ("--set", "optim.freeze_base_embedding=true")
    shutil.copytree(root / "runs/whole", root / "runs/base")
    train(root, toy_run.write_recipe(root / "tuned.yaml", "tuned", init="base", steps=4), *frozen)
    shutil.rmtree(root / "runs/base")
    for name, ranks in (("tuned-again", 2), ("tuned-moved", 1)):
        branch_off(root, name, "tuned", 2)
        recipe = toy_run.write_recipe(root / f"{name}.yaml", name, init="base", steps=4)
        train(root, recipe, *frozen, ranks=ranks)
        assert_same_curve(root, name, "tuned", 0.0 if ranks == 2 else 1e-5)


def test_zero_stage_0_changes_to_the_other_stages_and_back(root: Path) -> None:
    """1 -> 0 -> 3 -> 0 by steps, with frozen weights, which no optimizer stores."""
    settings = {"steps": 5, "checkpoint_every": 1, "keep_last": 9}
    frozen = ("--set", "optim.freeze_base_embedding=true")
    train(root, toy_run.write_recipe(root / "one.yaml", "one", **settings), *frozen)
    branch_off(root, "staged", "one", 2)
    recipe = toy_run.write_recipe(root / "staged.yaml", "staged", **settings)
    for stage, ranks, last in ((0, 2, 3), (3, 1, 4), (0, 1, 5)):
        output = train(root, recipe, *frozen, f"train.zero_stage={stage}", ranks=ranks)
        assert f", is {stage}: the checkpoint was converted" in output
        for step in range(last + 1, 6):
            shutil.rmtree(root / f"runs/staged/checkpoints/step-{step:08d}")
    assert_same_curve(root, "staged", "one", 1e-5)
    assert len(list((root / "runs/staged/checkpoints").iterdir())) == 4  # the converted copies are gone
    (_, moved, _), (_, whole, _) = (load_weights(root / "runs" / name) for name in ("staged", "one"))
    assert all(torch.allclose(moved[name], whole[name], rtol=0, atol=1e-4) for name in whole)


def test_half_precision_and_frozen_weights_move_to_other_ranks(root: Path) -> None:
    settings = ["train.precision=bf16", "train.zero_stage=3", "optim.freeze_base_embedding=true"]
    recipe = toy_run.write_recipe(root / "half.yaml", "half", steps=4, checkpoint_every=2)
    train(root, recipe, "--set", *settings)
    branch_off(root, "half-moved", "half", 2)
    recipe = toy_run.write_recipe(root / "half-moved.yaml", "half-moved", steps=4, checkpoint_every=2)
    train(root, recipe, "--set", *settings, ranks=1)
    assert_same_curve(root, "half-moved", "half", 1e-2)
    (_, one, _), (_, other, _) = (load_weights(root / "runs" / name) for name in ("half", "half-moved"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=2e-3) for name in one)


def test_an_optimizer_in_the_cpus_memory_resumes_here_and_on_other_ranks(root: Path) -> None:
    settings = ["train.zero_stage=2", "train.offload=[optimizer]"]
    recipe = toy_run.write_recipe(root / "off.yaml", "off", steps=4, checkpoint_every=2)
    train(root, recipe, "--set", *settings)
    for name, options in (("off-again", {}), ("off-moved", {"ranks": 1})):
        branch_off(root, name, "off", 2)
        recipe = toy_run.write_recipe(root / f"{name}.yaml", name, steps=4, checkpoint_every=2)
        changed = ["train.zero_stage=3", settings[1]] if options else settings
        output = train(root, recipe, "--set", *changed, **options)
        assert ("was converted" in output) == bool(options)
        assert_same_curve(root, name, "off", 1e-5 if options else 0.0)


def test_a_frozen_component_stays_as_it_was_on_any_ranks_and_cannot_thaw(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.zero_stage=2", "train.freeze=[vit]"]
    recipe = toy_run.write_recipe(root / "frozen.yaml", "frozen", steps=4, checkpoint_every=2)
    train(root, recipe, "--set", *settings)
    line = log(root, "frozen")[-1]
    assert {"lr.connector", "lr.llm", "grad_norm.llm"} <= set(line) and not {"lr.vit", "grad_norm.vit"} & set(line)
    branch_off(root, "frozen-moved", "frozen", 2)
    recipe = toy_run.write_recipe(root / "frozen-moved.yaml", "frozen-moved", steps=4, checkpoint_every=2)
    output = train(root, recipe, ranks=1, code=1)
    assert "cannot continue: train.freeze was ['vit'], is []: other parameters would be trained" in output
    assert "Traceback" not in output
    train(root, recipe, "--set", "train.zero_stage=3", settings[1], ranks=1)
    assert_same_curve(root, "frozen-moved", "frozen", 1e-5)
    monkeypatch.setenv("MOLMO2_DATA", str(root))
    first = Molmo2(PRESETS["tiny"]).init_weights(load_recipe(recipe).train.seed).state_dict()
    for name in ("frozen", "frozen-moved"):
        _, weights, _ = load_weights(name)
        assert {key.split(".")[0] for key in first if not torch.equal(weights[key], first[key])} == {
            *("connector", "text", "lm_head")
        }


def test_a_run_starts_from_the_weights_of_the_command_line_and_keeps_every_second_checkpoint(root: Path) -> None:
    settings = {"steps": 5, "checkpoint_every": 1, "keep_last": 1, "keep_every": 2}
    recipe = toy_run.write_recipe(root / "given.yaml", "given", init="no-such-run", **settings)
    start_from = str(root / "runs/whole/checkpoints/step-00000004")
    train(root, recipe, "--checkpoint", start_from, ranks=1)
    assert log(root, "given")[0]["loss"] < 0.9 * log(root, "whole")[0]["loss"]
    checkpoints = root / "runs/given/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    assert json.loads((checkpoints / "step-00000002/recipe.json").read_text())["init"] == start_from
    assert "given: finished" in train(root, recipe, "--checkpoint", start_from, ranks=1)
    output = train(root, recipe, "--checkpoint", "whole", "--set", "train.steps=6", ranks=1, code=1)
    assert f"--checkpoint 'whole': the run is at step 5 and began from '{start_from}'" in output
    assert "Traceback" not in output


def test_another_precision_is_refused(root: Path) -> None:
    changed = ["train.steps=20", "train.precision=bf16", "train.zero_stage=2"]
    output = train(root, root / "whole.yaml", "--set", *changed, code=1)
    assert "cannot continue: zero_stage was 1, is 2, precision was fp32, is bf16" in output
    assert "Traceback" not in output


def test_a_second_start_of_a_live_run_is_refused(root: Path) -> None:
    recipe = toy_run.write_recipe(root / "alive.yaml", "alive", steps=1)
    with lock_run(root / "runs/alive"):
        output = train(root, recipe, code=1)
    assert f"runs/alive: process {os.getpid()} on {socket.gethostname()} trains this run; wait for its end" in output
    assert "Traceback" not in output and not (root / "runs/alive/checkpoints").exists()
    train(root, recipe)


def copied(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "raw", tmp_path / "raw")
    shutil.copytree(root / "shards", tmp_path / "shards")
    return tmp_path


def edit_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "shards/sft/toy/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_shards_of_another_processor_are_refused(root: Path, tmp_path: Path) -> None:
    data = copied(root, tmp_path)
    edit_index(data, lambda index: index["processor"]["layout"].update(crop_size=56))
    output = train(data, toy_run.write_recipe(tmp_path / "r.yaml", "r"), ranks=1, code=1)
    assert "layout.crop_size: 56, wanted 48" in output
    assert "Traceback" not in output
    assert not (data / "runs/r/checkpoints").exists()


def test_changed_data_are_refused_on_resume_and_told(root: Path, tmp_path: Path) -> None:
    data = copied(root, tmp_path)
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=1)
    train(data, recipe, ranks=1)
    output = train(data, recipe, "--set", "train.steps=2", "--set", "data.seed=5", ranks=1, code=1)
    assert "the data has changed since the checkpoint" in output
    assert "settings.seed" in output
    assert "Traceback" not in output
    changed = ["--set", "train.steps=3", "data.seed=5", "--change-data"]
    output = train(data, recipe, *changed, ranks=1)
    assert "after step 1 the data change on purpose: settings.seed" in output
    (line,) = [json.loads(line) for line in (data / "runs/r/data_changes.jsonl").read_text().splitlines()]
    assert (line["step"], line["cursor"]) == (1, {"step": 1, "window": 1, "offset": 0})
    assert [line["step"] for line in log(data, "r")] == [1, 2, 3]
    train(data, recipe, "--set", "train.steps=4", "data.seed=5", ranks=1)  # it is the run's own now
    assert len((data / "runs/r/data_changes.jsonl").read_text().splitlines()) == 1


def test_a_flipped_byte_is_masked_and_recorded(root: Path, tmp_path: Path) -> None:
    data = copied(root, tmp_path)
    tar = data / "shards/sft/toy/000000.tar"
    body = bytearray(tar.read_bytes())
    body[600] ^= 1  # inside the first sample's record
    tar.write_bytes(body)
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=8)
    output = train(data, recipe, "--set", "logging.tensorboard=true", "train.checkpoint_every=3", ranks=1)
    assert re.search(r"masked in step \d+: toy/000000\.tar, .*at byte 0: .*checksum", output)
    recorded = [json.loads(line) for line in (data / "runs/r/quarantine.jsonl").read_text().splitlines()]
    masked = [line["step"] for line in log(data, "r") for _ in range(line["masked"])]
    assert masked
    assert [entry["step"] for entry in recorded] == masked
    assert {entry["shard"] for entry in recorded} == {"000000"}
    events = EventAccumulator(str(data / "runs/r/tensorboard")).Reload()
    checkpoints = [json.loads(line) for line in (data / "runs/r/data.jsonl").read_text().splitlines()]
    assert [line["step"] for line in checkpoints] == [3, 6, 8] and checkpoints[-1]["datasets"]["toy"]["masked"]
    for title, field in (("share", "drawn"), ("epochs", "epochs"), ("masked", "masked")):
        for name in checkpoints[0]["datasets"]:
            plotted = [(event.step, event.value) for event in events.Scalars(f"data/{title}/{name}")]
            assert plotted == [(line["step"], pytest.approx(line["datasets"][name][field])) for line in checkpoints]
    assert sum(event.value for event in events.Scalars("data/masked")) == len(masked)


def test_too_much_damage_ends_the_run_with_the_list(root: Path, tmp_path: Path) -> None:
    data = copied(root, tmp_path)
    tar = data / "shards/sft/toy/000000.tar"
    tar.write_bytes(tar.read_bytes()[:10_000])  # cut short: only the first sample or two are whole
    output = train(data, toy_run.write_recipe(tmp_path / "r.yaml", "r"), code=1)
    assert "damaged samples in toy, 1 allowed:" in output
    assert "the file is cut short" in output
    assert "Traceback" not in output
    assert not list((data / "runs/r/checkpoints").glob("step-*"))


def test_damaged_samples_count_together_over_ranks_and_restarts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One damaged sample is met in step 2 and one in step 3, by the two ranks; the budget of the dataset is one."""
    data = copied(root, tmp_path)
    monkeypatch.setenv("MOLMO2_DATA", str(data))
    recipe = load_recipe(toy_run.write_recipe(tmp_path / "r.yaml", "r"))
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings)
    cost = pack_cost(recipe, PRESETS["tiny"])
    first: dict[tuple[int, int], tuple[int, int]] = {}  # shard and row -> the step and the rank that first read it
    cursor = Cursor()
    for number in range(1, 6):
        step = plan.step(cursor)
        for rank in (0, 1):
            for pack in own_packs(step, cost, recipe.data.sequence_length, rank, 2, recipe.train.micro_batch):
                for draw in pack.draws:
                    first.setdefault((draw.shard, draw.row), (number, rank))
        cursor = step.cursor
    for wanted in ((2, 0), (3, 1)):
        shard, row = next(place for place, found in first.items() if found == wanted)
        entry = plan.datasets[0].sidecars[shard][row]
        with open(data / f"shards/sft/toy/{shard:06d}.tar", "r+b") as file:
            file.seek(int(entry["offset"]) + 600)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    for name, ranks in (("alone", 1), ("pair", 2)):
        output = train(data, toy_run.write_recipe(tmp_path / f"{name}.yaml", name), ranks=ranks, code=1)
        assert "2 damaged samples in toy, 1 allowed:" in output
        assert [line["step"] for line in log(data, name)] == [1, 2]
        assert "Traceback" not in output
    parts = toy_run.write_recipe(tmp_path / "parts.yaml", "parts", steps=2)
    train(data, parts)
    output = train(data, parts, "--set", "train.steps=6", code=1)
    assert "2 damaged samples in toy, 1 allowed:" in output
    assert len(log(data, "parts")) == 2
    train(data, parts, "--set", "train.steps=6", "data.damage_budget=0.9")
    assert len(log(data, "parts")) == 6
    output = train(data, toy_run.write_recipe(tmp_path / "none.yaml", "none"), "--set", "data.damage_budget=0", code=1)
    assert "1 damaged samples in toy, 0 allowed:" in output
    assert len(log(data, "none")) == 1


def test_a_full_disk_is_told_and_nothing_is_taken_for_whole(root: Path, tmp_path: Path) -> None:
    data = copied(root, tmp_path)
    limit = 1_000_000  # bytes of a file; the states of the tiny model are larger
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r")
    output = train(data, recipe, ranks=1, code=1, file_limits={0: limit})
    assert "step-00000002: cannot be written" in output
    assert list((data / "runs/r/checkpoints").iterdir()) == []
    train(data, recipe, ranks=1)
    assert len(log(data, "r")) == 6


@pytest.mark.parametrize("choice", ["stop", "warn"])
def test_a_disk_that_is_full_on_one_rank_hangs_no_other(root: Path, choice: str) -> None:
    name = f"full-{choice}"
    settings = {"steps": 3, "checkpoint_every": 2, "phase_deadline": 20, "on_full_disk": choice}
    recipe = toy_run.write_recipe(root / f"{name}.yaml", name, **settings)
    output = train(root, recipe, code=int(choice == "stop"), file_limits={1: 100_000})
    assert "step-00000002: cannot be written (rank 1: " in output
    assert "has been in phase" not in output and "Traceback" not in output
    assert len(log(root, name)) == (2 if choice == "stop" else 3)
    assert list((root / f"runs/{name}/checkpoints").iterdir()) == []


def test_every_error_of_a_recipe_in_one_message(root: Path) -> None:
    output = train(root, root / "whole.yaml", "--set", "train.stepz=3", "--set", "optim.eps=-1", code=1)
    assert output.count("train.stepz: unknown key; did you mean steps?") == 1
    assert output.count("optim.eps: Input should be greater than 0 (got -1)") == 1
    assert "Traceback" not in output.split("launch.py")[-1]


def test_ranks_that_do_not_fit_are_told_with_all_numbers(root: Path) -> None:
    output = train(root, root / "whole.yaml", "--set", "name=r", "--set", "train.sp=2", ranks=1, code=1)
    assert "(ranks 1, train.sp 2, train.packs_per_step 4, train.micro_batch 1, attention heads 4)" in output
