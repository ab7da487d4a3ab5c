"""A run says what a user can act on: no noise of libraries, and nothing is compiled without need or in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_run

from molmo2.parallel import cpu_collectives

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_run_on_one_rank_prints_its_own_lines_alone_and_compiles_nothing(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    recipe = toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=6)
    environment = {key: value for key, value in os.environ.items() if key not in {"DS_ACCELERATOR", "PYTHONWARNINGS"}}
    environment |= {"MOLMO2_DATA": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, "molmo2/train.py", "--recipe", str(recipe), "--set", "data.workers=16"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [*run.stdout.splitlines(), *run.stderr.splitlines()]
    assert len(lines) == 8 and all(line.startswith("r: ") for line in lines), lines
    assert not (tmp_path / "extensions").exists()


def test_an_operator_that_must_be_compiled_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    joined: list[bool] = []
    monkeypatch.setattr(cpu_collectives.deepspeed, "init_distributed", lambda verbose: joined.append(verbose))
    monkeypatch.setattr(cpu_collectives, "_free_name_of_shared_memory", lambda: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    cpu_collectives.join_on_cpu()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    cpu_collectives.join_on_cpu()
    assert "compiles its collectives for CPUs" in capsys.readouterr().err
    name = cpu_collectives.ShareMemCommBuilder.NAME
    (compiled,) = tmp_path.glob(f"**/{name}")
    (compiled / f"{name}.so").touch()
    cpu_collectives.join_on_cpu()
    assert capsys.readouterr().err == "" and len(joined) == 3
