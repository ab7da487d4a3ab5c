"""Task r of N: separate processes at once, kills at any moment, failed shards; always the bytes of one run."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build_cases import build, build_part, tree

from shards.build.builder import MAX_FAILED
from shards.build.claim import BuildError
from shards.build.writer import WriteError
from tools.build_shards import task_from, task_of

SCRIPT = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[5]); from build_cases import build_part\n"
    "build_part(Path(sys.argv[1]), Path(sys.argv[2]), 'demo-cap', task_of=(int(sys.argv[3]), int(sys.argv[4])))"
)


def start(raw: Path, out: Path, rank: int, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(raw), str(out), str(rank), str(number), str(Path(__file__).parents[1])]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of demo-cap as one run of one process makes them."""
    out = tmp_path_factory.mktemp("whole")
    build(raw, out, "demo-cap")
    return tree(out)


@pytest.mark.slow
def test_three_processes_at_once_give_the_bytes_of_one(raw: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    tasks = [start(raw, tmp_path, rank, 3) for rank in range(3)]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0, 0]
    assert not (tmp_path / "demo-cap" / "index.json").exists()
    closed = build_part(raw, tmp_path, "demo-cap")
    assert (closed.num_made, closed.num_kept) == (0, sum(name.endswith(".tar") for name in whole))
    assert tree(tmp_path) == whole


@pytest.mark.slow
def test_tasks_killed_at_any_moment_end_with_equal_bytes(raw: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Both tasks are killed some time after the first file of a shard, four times, and then the whole is built."""
    draw = random.Random(1)
    killed = 0
    for _ in range(4):
        tasks = [start(raw, tmp_path, rank, 2) for rank in range(2)]
        before, deadline = len(list(tmp_path.rglob("*"))), time.monotonic() + 60
        while len(list(tmp_path.rglob("*"))) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        for task in tasks:
            task.kill()
            killed += task.wait() < 0
    assert killed >= 2
    build(raw, tmp_path, "demo-cap")
    assert tree(tmp_path) == whole


def test_failed_shards_alone_are_tried_again(
    raw: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in shard 1 costs no other shard; a retry builds that one and not those that nobody has tried."""
    from shards.build import task as build_task

    write = build_task.write_shard

    def faulty(path: Path, name: str, *rest: object) -> object:
        if name == "000001":
            raise WriteError("key x occurs twice")
        return write(path, name, *rest)  # type: ignore[arg-type]

    folder = tmp_path / "demo-cap"
    with monkeypatch.context() as patch:
        patch.setattr(build_task, "write_shard", faulty)
        with pytest.raises(BuildError, match=r"1 shards failed; --retry-failed(.|\n)*000001: WriteError: key x occurs"):
            build_part(raw, tmp_path, "demo-cap", task_of=(1, 2))
    made = {path.name for path in folder.glob("*.tar")}
    assert "000003.tar" in made and "000001.tar" not in made
    assert json.loads((folder / "000001.failed.json").read_text())["reason"] == "WriteError: key x occurs twice"
    with pytest.raises(BuildError, match=r"\d+ shards are still to be built; omit --retry-failed"):
        build_part(raw, tmp_path, "demo-cap", retry_failed=True)
    assert {path.name for path in folder.glob("*.tar")} == made | {"000001.tar"}
    build(raw, tmp_path, "demo-cap")
    assert tree(tmp_path) == whole


def test_many_failures_end_the_run_early(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise RuntimeError("no codec")

    monkeypatch.setattr("shards.build.task.write_shard", faulty)
    with pytest.raises(BuildError, match=rf"{MAX_FAILED + 1} shards failed"):
        build(raw, tmp_path, "demo-cap")
    assert len(list((tmp_path / "demo-cap").glob("*.failed.json"))) == MAX_FAILED + 1


def test_a_task_neither_overwrites_nor_mixes_settings(raw: Path, tmp_path: Path) -> None:
    build_part(raw, tmp_path, "demo-chat", task_of=(0, 2))
    with pytest.raises(BuildError, match="only 0/1 may overwrite"):
        build_part(raw, tmp_path, "demo-chat", task_of=(1, 2), overwrite=True)
    with pytest.raises(BuildError, match=r"built with other settings: row\..*without --task"):
        build_part(raw, tmp_path, "demo-chat", task_of=(1, 2), row={"options": {"style": "user_qa"}})


@pytest.mark.parametrize(
    ("variables", "task"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "RANK": "0", "WORLD_SIZE": "1"}, (1, 3)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}, (4, 8)),
    ],
)
def test_the_launcher_says_which_task(variables: dict[str, str], task: tuple[int, int]) -> None:
    count = {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert task_from(variables | (count if "SLURM_ARRAY_TASK_ID" in variables else {})) == task


def test_tasks_that_would_leave_shards_out_are_refused() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "7"}
    with pytest.raises(ValueError, match="array of 3 jobs numbered 1 to 7: give --task r/N"):
        task_from(array | {"SLURM_ARRAY_TASK_COUNT": "3"})
    for wrong in ("3/3", "1", "-1/2"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"r in 0\.\.N-1"):
            task_of(wrong)
