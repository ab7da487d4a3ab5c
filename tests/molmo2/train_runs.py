"""Runs of the trainer for tests: start one, wait, kill it, read its log, compare its curve with another's."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest
from fork_server import python
from ranks import CPU, ROOT, SCRIPT, Launch, free_port

BIN = Path(sys.executable).parent
NUMBERS = itertools.count()
LIMIT = 300.0  # seconds that a run may take


def variables(root: Path) -> dict[str, str]:
    """The environment of a run whose data lie below `root`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return own | CPU | {"MOLMO2_DATA": str(root)}


def start(
    root: Path, recipe: Path, *options: str, ranks: int = 2, file_limits: Mapping[int, int] = MappingProxyType({})
) -> Launch:
    """Start the trainer on forked ranks; what it prints goes to a file, since nobody empties a pipe."""
    output = Path(tempfile.gettempdir(), f"train-{os.getpid()}-{next(NUMBERS)}.txt")
    return Launch(["--recipe", str(recipe), *options], ranks, variables(root), output, dict(file_limits))


def train(root: Path, recipe: Path, *options: str, code: int = 0, **more: Any) -> str:
    """Run the trainer on forked ranks to its end and return what it printed."""
    process = start(root, recipe, *options, **more)
    found = process.wait(LIMIT)
    output = process.output.read_text()
    assert found == code, output
    return output


def launch(root: Path, recipe: Path, *options: str) -> subprocess.Popen[str]:
    """Start the trainer with the real deepspeed launcher on two ranks, which are forked and cannot be signalled."""
    words = [python(), str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), SCRIPT]
    return _started(root, [*words, "--recipe", str(recipe), *options], PYTHON_EXEC=python())


def launch_on_two_machines(launcher: str, root: Path, recipe: Path) -> list[subprocess.Popen[str]]:
    """Start one rank of the trainer with a real launcher for each of two machines, which are this one."""
    port, hosts = str(free_port()), root / f"{launcher}-hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    meet = ["--master_addr", "127.0.0.1", "--master_port", port]
    words = {
        "deepspeed": [str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", *meet],
        "torchrun": [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", *meet],
    }[launcher]
    return [_started(root, [*words, "--node_rank", str(rank), SCRIPT, "--recipe", str(recipe)]) for rank in range(2)]


def _started(root: Path, command: list[str], **more: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables(root) | more, start_new_session=True, **pipes)


def log(root: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    path = root / "runs" / name / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(root: Path, name: str) -> list[dict[str, Any]]:
    """The log without what a clock measured."""
    timed = {"seconds", "tokens_per_second", "tflops", "mfu", "data_wait", "working_share", "slowest_rank"}
    return [
        {key: value for key, value in line.items() if key not in timed and "_ms." not in key}
        for line in log(root, name)
    ]


def wait_for(process: Launch | subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, while the run goes on."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended, or two minutes passed"
        time.sleep(0.02)


def ranks_of(process: Launch | subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks, launchers and loader workers left out."""
    if isinstance(process, Launch):
        return process.ranks()
    below = psutil.Process(process.pid).children(recursive=True)
    scripts = [child for child in below if any(part.endswith(SCRIPT) for part in child.cmdline()[1:3])]
    pids = {child.pid for child in scripts}
    return [child for child in scripts if child.ppid() not in pids]


def branch_off(root: Path, name: str, start: str, step: int) -> None:
    """A run that has got as far as a checkpoint of another run."""
    runs = root / "runs"
    shutil.copytree(runs / start / f"checkpoints/step-{step:08d}", runs / name / f"checkpoints/step-{step:08d}")
    shutil.copy(runs / start / "log.jsonl", runs / name / "log.jsonl")


def assert_same_curve(root: Path, name: str, other: str, tolerance: float) -> None:
    """Two runs took the same steps, up to a relative tolerance of the loss and a hundred times that of norms."""
    found, wanted = log(root, name), log(root, other)
    assert [(line["step"], line["tokens"]) for line in found] == [(line["step"], line["tokens"]) for line in wanted]
    for line, expected in zip(found, wanted, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance), line["step"]
        assert line["lr.llm"] == expected["lr.llm"]
        norms = [key for key in expected if key.startswith("grad_norm.")]
        assert norms and norms == [key for key in line if key.startswith("grad_norm.")]
        for key in norms:  # sums of squares, in another order
            assert line[key] == pytest.approx(expected[key], rel=100 * tolerance), (line["step"], key)
