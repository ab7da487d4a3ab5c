"""tests/guard.py ends a run that hangs, names what was running, and fails a run that leaves something behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
HANGING = """
import os, time
from pathlib import Path

def sleeps_for_ever():
    time.sleep(600)

Path(os.environ["MOLMO2_TEST_RUN"], f"running-{os.getpid()}").write_text("tests/test_x.py::test_that_hangs")
sleeps_for_ever()
"""


def guard(code: str, *options: str) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tests/guard.py", *options, "--", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return run.returncode, run.stdout + run.stderr


def test_a_run_that_leaves_nothing_keeps_its_code() -> None:
    assert guard("print('fine')") == (0, "fine\n")
    assert guard("raise SystemExit(5)")[0] == 5


@pytest.mark.slow
def test_a_hang_ends_with_the_name_of_the_test_and_the_stacks() -> None:
    code, output = guard(HANGING, "--minutes", "0.05")
    assert code == 1
    assert "guard: still running after 0.05 minutes" in output
    assert "guard: running: tests/test_x.py::test_that_hangs" in output
    assert "sleeps_for_ever" in output.split("--- ")[1]


@pytest.mark.slow
def test_a_process_left_behind_is_named_and_killed() -> None:
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code, output = guard(start)
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("guard: left behind: process ")]
    assert not psutil.pid_exists(int(line.split()[4].rstrip(":")))


@pytest.mark.slow
def test_signals_end_what_it_started_however_many_there_are(tmp_path: Path) -> None:
    """make is signalled with its whole group and passes its own signal on, so that two arrive at once."""
    script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}} ")
time.sleep(600)
"""
    command = [sys.executable, ROOT / "tests/guard.py", "--", sys.executable, "-c", script]
    with subprocess.Popen(command) as run:
        while not (pids := [int(pid) for pid in _read(tmp_path / "pids").split()]):
            time.sleep(0.05)
        for _ in range(3):
            run.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("kind", "path"),
    [("buffer", Path(f"/dev/shm/molmo2-test-guard-{os.getpid()}")), ("file", ROOT / "left-behind.txt")],
)
def test_a_file_left_behind_is_named(kind: str, path: Path) -> None:
    try:
        code, output = guard(f"open({str(path)!r}, 'w')")
    finally:
        path.unlink()
    assert code == 1
    assert f"guard: left behind: {kind} {path}" in output
