"""The benchmark of a GPU, at its smallest size on a CPU: every part writes its figures, one JSON line each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import python

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "attention": {"machine": 1, "flex": 1, "error": 6, "connector": 2, "visual_first": 2, "time": 12, "end": 1},
    "step": {"machine": 1, "kernels": 1, "step": 3, "end": 1},
    "train": {"machine": 1, "shards": 1, "engine": 1, "end": 1},
}
# Neither may be imported where only torch is installed.
CODE = """
import runpy, sys
sys.modules |= {"deepspeed": None, "pydantic": None}
sys.argv = ["bench_gpu.py", *sys.argv[1:]]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/bench_gpu.py", run_name="__main__")
"""


def figures(command: list[str], code: int = 0) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == code, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def check(lines: list[dict[str, Any]], part: str) -> None:
    names = [line["figure"] for line in lines]
    assert {name: names.count(name) for name in names} == FIGURES[part]
    assert all(line["part"] == part and "error" not in line for line in lines)
    assert lines[-1]["failed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "step"])
def test_a_part_needs_torch_and_the_model_alone(part: str) -> None:
    lines = figures([sys.executable, "-c", CODE, "--device", "cpu", "--part", part])
    check(lines, part)
    for line in lines:
        if line["figure"] == "error":
            assert max(line[name] for name in ("out", "dq", "dk", "dv")) < 1e-5
    losses = [line["loss"] for line in lines if line["figure"] == "step"]
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-4)


@pytest.mark.slow
def test_the_trainer_is_measured_and_resumes_where_it_was() -> None:
    lines = figures([python(), "benchmarks/bench_gpu.py", "--device", "cpu", "--part", "train"])
    check(lines, "train")
    assert lines[1]["resumed_loss_difference"] == lines[2]["loss_difference_after_load"] == 0


@pytest.mark.slow
def test_a_part_ends_when_its_time_is_over() -> None:
    lines = figures([sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--part", "step", "--seconds", "0"])
    assert [line["figure"] for line in lines] == ["machine", "cut", "end"]
