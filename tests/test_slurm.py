"""The batch scripts of recipes/launch on a real Slurm of two nodes: training, a signal, and building."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_run
import yaml
from build_cases import make_raw, tree
from fork_server import python
from ranks import ROOT, SCRIPT
from slurm_cluster import cluster, ports, slurm, wait_for, why_not
from train_runs import BIN, log, train, variables

pytestmark = [pytest.mark.dist, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
SMALL = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10", "--open-mode=append"]  # two nodes of one CPU


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder) as variables:
        yield variables


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    toy_run.build_toy(root)
    return root


def submit(variables: dict[str, str], root: Path, *arguments: str) -> str:
    """The number of a job that trains or builds with the data of `root`."""
    extra = {"MOLMO2_DATA": str(root), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    extra |= {"MOLMO2_MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports(1)[0])}
    environment = variables | extra
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={root}/%x-%A.log", *arguments]
    return slurm(environment, *command).strip()


def forked(nodes: dict[str, str]) -> dict[str, str]:
    """The variables with which scripts find the python of the fork server, which passes no signals on."""
    return nodes | {"PATH": f"{Path(python()).parent}:{nodes['PATH']}"}


def finished(variables: dict[str, str], root: Path, job: str) -> None:
    """Wait for a job, and see that it ended well."""

    def state() -> str:
        return slurm(variables, "scontrol", "show", "job", job)

    for _ in range(1200):
        if "JobState=PENDING" not in (now := state()) and "JobState=RUNNING" not in now and "COMPLETING" not in now:
            break
        time.sleep(0.2)
    told = "".join(path.read_text() for path in root.glob(f"*{job}*.log"))
    assert set(re.findall(r"JobState=(\w+)", now)) == {"COMPLETED"}, f"{now}\n{told}"


def test_two_nodes_train_like_one_machine(nodes: dict[str, str], root: Path) -> None:
    script = str(ROOT / "recipes/launch/train.slurm")
    alone = toy_run.write_recipe(root / "alone.yaml", "alone", steps=4)
    train(root, alone)
    recipe = toy_run.write_recipe(root / "nodes.yaml", "nodes", steps=4)
    job = submit(
        forked(nodes), root, "--ntasks-per-node=1", *SMALL, script, str(recipe), "--set", "logging.tensorboard=false"
    )
    finished(nodes, root, job)
    assert "on 2 ranks" in (root / f"molmo2-{job}.log").read_text()
    losses = [[line["loss"] for line in log(root, name)] for name in ("alone", "nodes")]
    assert losses[0] == losses[1] and len(losses[1]) == 4


def test_a_signalled_job_saves_goes_back_into_the_queue_and_finishes(nodes: dict[str, str], root: Path) -> None:
    script = str(ROOT / "recipes/launch/train.slurm")
    recipe = toy_run.write_recipe(root / "told.yaml", "told", steps=5000, checkpoint_every=5000)
    job = submit(nodes, root, "--ntasks-per-node=1", *SMALL, script, str(recipe))

    def output() -> str:
        return (root / f"molmo2-{job}.log").read_text()

    wait_for(lambda: len(log(root, "told")) >= 2, output)
    slurm(nodes, "scancel", "--signal=USR1", job)
    wait_for(lambda: "Restarts=1" in slurm(nodes, "scontrol", "show", "job", job), output)
    steps = len(log(root, "told"))
    assert 2 <= steps < 5000
    assert [path.name for path in (root / "runs/told/checkpoints").iterdir()] == [f"step-{steps:08d}"]
    toy_run.write_recipe(recipe, "told", steps=steps + 2, checkpoint_every=5000)
    # Slurm would hold the job back for two minutes, in which the nodes clear away its first run.
    wait_for(lambda: set(slurm(nodes, "sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, output)
    time.sleep(2)  # a node refuses credentials of the second in which it ended the first run
    slurm(nodes, "scontrol", "update", f"JobId={job}", "StartTime=now")
    finished(nodes, root, job)
    assert [line["step"] for line in log(root, "told")] == list(range(1, steps + 3))
    assert (root / "runs/told/summary.json").exists()


def test_deepspeeds_slurm_launcher_trains_on_both_nodes(nodes: dict[str, str], root: Path) -> None:
    recipe, hosts = toy_run.write_recipe(root / "launched.yaml", "launched", steps=2), root / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports(1)[0])}
    command = [python(), str(BIN / "deepspeed"), "--hostfile", str(hosts), "--launcher", "slurm", "--no_ssh_check"]
    command += ["--master_addr", meet["MASTER_ADDR"], SCRIPT, "--recipe", str(recipe)]
    environment = nodes | variables(root) | {"SLURM_CONF": nodes["SLURM_CONF"], "PYTHON_EXEC": python()} | meet
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on 2 ranks" in run.stdout
    assert (root / "runs/launched/summary.json").exists()


def test_an_array_builds_the_bytes_of_one_job(nodes: dict[str, str], tmp_path: Path) -> None:
    script, raw = str(ROOT / "recipes/launch/build.slurm"), make_raw(tmp_path / "raw")
    catalog = yaml.safe_load((ROOT / "shards/catalog/demo.yaml").read_text())
    catalog["stages"]["sft"]["examples_per_shard"] = 16
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(catalog))
    for name, arrays in (("alone", []), ("array", ["--array=0-1"])):
        options = [
            "--catalog",
            str(tmp_path / "small.yaml"),
            "--datasets",
            "demo-cap",
            "--raw",
            str(raw),
            "--out",
            str(tmp_path / name),
        ]
        for array in (arrays, []) if arrays else ([],):
            job = submit(forked(nodes), tmp_path, *array, *SMALL, script, "sft", *options)
            finished(nodes, tmp_path, job)
    alone, array = (
        {n: d for n, d in tree(tmp_path / name).items() if "report" not in n} for name in ("alone", "array")
    )
    assert alone == array and sum(name.endswith(".tar") for name in alone) > 2
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "task 0/2: " in logs and "task 1/2: " in logs
