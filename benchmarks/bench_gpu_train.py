"""The part `train` of bench_gpu.py: the trainer itself, with DeepSpeed, checkpoints and shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bench_gpu import Bench

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def measure(bench: Bench) -> None:
    """An engine of ZeRO-2 with a checkpoint, then a run from shards that is resumed."""
    if bench.tiny:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOLMO2_DATA"] = folder
        steps = 6 if bench.tiny else 20
        with bench.figure("shards", model="tiny", steps=steps) as values:
            _from_shards(Path(folder), steps, bench.tiny, values)
        for name in ("tiny",) if bench.tiny else ("nano", "4b"):
            if bench.over():
                return
            with bench.figure("engine", model=name, zero_stage=2) as values:
                _engine(bench, name, values)


def _from_shards(folder: Path, steps: int, tiny: bool, values: dict[str, Any]) -> None:
    """Train on small shards, in other processes; delete the last checkpoint and compare the steps trained again."""
    sys.path.insert(0, str(ROOT / "tests" / "molmo2"))
    import toy_run

    toy_run.build_toy(folder)
    precision: dict[str, Any] = {"precision": "fp32"} if tiny else {"precision": "bf16"}
    recipe = toy_run.write_recipe(
        folder / "r.yaml", "r", steps=steps, checkpoint_every=steps // 2, zero_stage=2, recompute="light", **precision
    )

    def train() -> list[dict[str, Any]]:
        command = [sys.executable, "molmo2/train.py", "--recipe", str(recipe)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr[-400:])
        return [json.loads(line) for line in (folder / "runs/r/log.jsonl").read_text().splitlines()]

    since = time.perf_counter()
    before = train()
    values |= {"run_s": time.perf_counter() - since, "first_loss": before[0]["loss"], "last_loss": before[-1]["loss"]}
    values["step_ms"] = 1e3 * min(line["seconds"] for line in before)
    shutil.rmtree(folder / f"runs/r/checkpoints/step-{steps:08d}")
    after = train()
    pairs = [(old["loss"], new["loss"]) for old, new in zip(before, after, strict=True)][steps // 2 :]
    values["resumed_loss_difference"] = max(abs(new - old) / abs(old) for old, new in pairs)


def _engine(bench: Bench, name: str, values: dict[str, Any]) -> None:
    """Steps of one pack under ZeRO-2; a checkpoint is written and read."""
    from molmo2.checkpoint.files import load_states, save
    from molmo2.config import load_recipe
    from molmo2.model.molmo2 import Molmo2
    from molmo2.model.presets import PRESETS
    from molmo2.parallel.mesh import SINGLE
    from molmo2.training.check_sp import check_pack
    from molmo2.training.dry_run import measure_saved, memory
    from molmo2.training.engine import start_distributed, start_engine

    config = PRESETS[name]
    tokens, crops = (256, 8) if bench.tiny else (4_096, 32)
    sizes = [f"data.sequence_length={tokens}", f"data.max_crops={crops}", f"model={name}", "name=bench"]
    batch_sizes = ["train.packs_per_step=1", "train.micro_batch=1"]
    precision = ["train.precision=fp32"] if bench.tiny else []
    recipe = load_recipe(ROOT / "recipes/stage2.yaml", [*sizes, *batch_sizes, *precision])
    if not torch.distributed.is_initialized():
        start_distributed()
    values["estimated_gib"] = sum(memory(recipe, 1, measure_saved(config, bench.dtype)).values()) / GIB
    bench.reset_peak()
    engine, _, _ = start_engine(Molmo2(config).init_weights(0), recipe, SINGLE)
    placed = engine.module.place(check_pack(config, tokens, crops), bench.device)
    losses = []

    def step() -> None:
        loss, _ = engine(placed, 1)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(loss.item())

    first, best = bench.timed(step)
    values |= {"tokens": tokens, "crops": crops, "first_s": first, "step_ms": 1e3 * best, "peak_gib": bench.peak_gib()}
    since = time.perf_counter()
    path = save(engine, recipe, config, 1, {}, sp=1)
    values["save_s"] = time.perf_counter() - since
    values["checkpoint_gib"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / GIB
    step()
    since = time.perf_counter()
    load_states(engine, path)
    values["load_s"] = time.perf_counter() - since
    step()
    values["loss_difference_after_load"] = abs(losses[-1] - losses[-2]) / abs(losses[-2])
    engine.destroy()
