"""The ready files for launchers: scripts that parse, options that exist, and machines that meet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ssh_machines
import yaml
from fork_server import python
from ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "recipes/launch"
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("name", ["train.slurm", "build.slurm"])
def test_scripts_parse_and_want_their_argument(name: str, tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True).returncode == 0
    run = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
    assert run.returncode != 0 and re.search("the path of a recipe|pretraining, sft", run.stderr)


def test_the_training_script_gives_each_task_its_rank(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands and for python that say what they were given."""
    run = run_on_stand_ins(tmp_path, rank=3, python='echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $*"')
    assert run.stdout == "3 16 3 node1 molmo2/train.py --recipe recipes/stage2.yaml --set train.sp=8\n"


def run_on_stand_ins(folder: Path, rank: int, python: str) -> subprocess.CompletedProcess[str]:
    """train.slurm with stand-ins for Slurm's commands, which run one rank of 16, and for python."""
    for name, text in {
        "scontrol": '[ "$1" = requeue ] && echo "requeue $2" || { echo node1; echo node2; }',
        "srun": f'shift; export SLURM_PROCID={rank} SLURM_NTASKS=16 SLURM_LOCALID={rank}; "$@"',
        "python": python,
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "TMPDIR": str(folder)}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", LAUNCH / "train.slurm", "recipes/stage2.yaml", "--set", "train.sp=8"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("python", "code", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 1", 1, False),
        ("exit 75", 0, True),
        ("trap 'exit 75' USR1; kill -USR1 $PPID $$", 0, True),  # Slurm signals the shell of a task as well
    ],
)
def test_the_training_script_goes_back_into_the_queue_when_it_was_stopped(
    tmp_path: Path, python: str, code: int, requeued: bool
) -> None:
    run = run_on_stand_ins(tmp_path, rank=0, python=python)
    assert run.returncode == code, run.stderr
    assert ("requeue 7\n" in run.stdout) == requeued
    assert not list(tmp_path.glob("molmo2-stopped-*"))


def test_yaml_files_name_what_exists() -> None:
    job = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))[1]
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    for text in (container["args"][0], sky["run"] + sky["envs"]["RECIPE"]):
        assert "molmo2/train.py" in text
        assert (ROOT / re.findall(r"recipes/\S+\.yaml", text)[0]).exists()
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert f"--nnodes {job['spec']['completions']}" in container["args"][0]
    grace = int(re.findall(r"--shutdown_timeout (\d+)", container["args"][0])[0])
    assert grace < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_tasks_of_srun_that_cannot_meet_do_not_train_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from molmo2.train import main

    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"STEP_NUM_TASKS": "2", "PROCID": "1", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(["--recipe", "recipes/stage1.yaml"]) == 1
    assert "srun started 2 tasks, and MASTER_ADDR is not set" in capsys.readouterr().err
    assert "RANK" not in os.environ


def test_the_hostfile_is_one_for_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile"))) == {"node1": 8, "node2": 8}


def toy(root: Path) -> tuple[Path, str, dict[str, str]]:
    """A recipe of two steps with its data, a free port, and the environment for it."""
    sys.path.insert(0, str(ROOT / "tests/molmo2"))
    import toy_run

    toy_run.build_toy(root)
    port = str(free_port())
    environment = {**os.environ, "MOLMO2_DATA": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return toy_run.write_recipe(root / "r.yaml", "r", steps=2), port, environment


@pytest.mark.dist
def test_accelerate_launches_it(tmp_path: Path) -> None:
    recipe, port, environment = toy(tmp_path)
    command = [python(), BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]  # fmt: skip
    command += ["molmo2/train.py", "--recipe", recipe]
    variables = environment | {"PYTHON_EXEC": python()}
    run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on 2 ranks" in run.stdout


@pytest.mark.dist
@pytest.mark.skipif(ssh_machines.why_not() is not None, reason=str(ssh_machines.why_not()))
def test_deepspeed_starts_both_machines_of_a_hostfile_over_ssh(tmp_path: Path) -> None:
    recipe, port, environment = toy(tmp_path / "data")
    environment["PYTHON_EXEC"] = python()
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ssh_machines.ADDRESSES))
    own = ("PATH", "MOLMO2_DATA", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PYTHON_EXEC")
    sent = tmp_path / "sent"  # ssh does not pass these on
    sent.write_text("".join(f"{name}={environment[name]}\n" for name in own if name in environment))
    command = [python(), BIN / "deepspeed", "--hostfile", hosts, "--master_addr", ssh_machines.ADDRESSES[0]]
    command += ["--master_port", port, "molmo2/train.py", "--recipe", recipe]
    with ssh_machines.machines(tmp_path) as reached:
        variables = environment | {"PATH": reached["PATH"], "DS_ENV_FILE": str(sent)}
        run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on 2 ranks" in run.stdout
    assert {f"{address}: " for address in ssh_machines.ADDRESSES} <= {line[:11] for line in run.stdout.splitlines()}
    assert (tmp_path / "data/runs/r/summary.json").exists()
