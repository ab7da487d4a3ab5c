"""Shards built by datatrove's executors are those of one process; its Slurm executor runs on a real Slurm."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from build_cases import make_raw, tree
from fork_server import python
from slurm_cluster import cluster, slurm, wait_for, why_not

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("raw")
    catalog = yaml.safe_load((ROOT / "shards/catalog/demo.yaml").read_text())
    catalog["stages"]["sft"]["examples_per_shard"] = 8
    (folder / "small.yaml").write_text(yaml.safe_dump(catalog))
    files = ["--catalog", str(folder / "small.yaml"), "--raw", str(make_raw(folder / "raw"))]
    return ["--stage", "sft", *files, "--workers", "1", "--datasets", "demo-count", "demo-video-qa"]


def start(tool: str, *arguments: str, **variables: str) -> str:
    command = [python(), str(TOOLS / tool), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if "report" not in name}


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone")
    start("build_shards.py", *options, "--out", str(out))
    return bytes_of(out)


@pytest.mark.dist
def test_the_local_executor_builds_the_same_bytes(options: list[str], alone: dict[str, bytes], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    engine = ["--engine", "local", "--tasks", "2", "--logs", str(tmp_path / "logs"), "--"]
    start("build_on_datatrove.py", *engine, *options, "--out", out)
    assert bytes_of(tmp_path / "out") == alone
    assert sum(name.endswith(".tar") for name in alone) > 3
    for task in ("00000", "00001"):  # both had a share
        assert (tmp_path / "logs/tasks/completions" / task).exists()
    (tmp_path / "out/sft/demo-count/000001.tar").unlink()  # the engine has seen its tasks end; the shards say otherwise
    start("build_on_datatrove.py", *engine, *options, "--out", out)
    assert bytes_of(tmp_path / "out") == alone


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with cluster(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


@pytest.mark.dist
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_slurm_executor_builds_the_same_bytes(
    options: list[str], alone: dict[str, bytes], nodes: dict[str, str], tmp_path: Path
) -> None:
    (partition,) = slurm(nodes, "sinfo", "-h", "-o", "%R").split()
    engine = ["--engine", "slurm", "--tasks", "2", "--partition", partition, "--time", "10", "--gb", "1"]
    engine += ["--logs", str(tmp_path / "logs"), "--"]
    start("build_on_datatrove.py", *engine, *options, "--out", str(tmp_path / "out"), **nodes)

    def told() -> str:
        return slurm(nodes, "squeue") + "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.out"))

    indexes = [tmp_path / "out/sft" / name / "index.json" for name in ("demo-count", "demo-video-qa")]
    wait_for(lambda: all(path.exists() for path in indexes), told)
    assert bytes_of(tmp_path / "out") == alone, told()


@pytest.mark.slow
def test_what_the_engine_says_is_not_for_the_user(tmp_path: Path) -> None:
    command = [python(), str(TOOLS / "build_on_datatrove.py"), "--engine", "local", "--tasks", "1", "--"]
    run = subprocess.run([*command, "--task", "0/2"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--task is the engine's to say" in run.stderr
