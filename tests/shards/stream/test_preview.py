"""The mixture preview, as a command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy import write_dataset

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of 20 and 5 samples, and a recipe that asks for three parts and one."""
    root = tmp_path_factory.mktemp("preview")
    write_dataset(root / "shards" / "sft", "alpha", 20)
    write_dataset(root / "shards" / "sft", "beta", 5)
    recipe = yaml.safe_load((ROOT / "recipes/demo/stage2.yaml").read_text())
    groups = {"one": {"rate": 3, "datasets": {"alpha": None}}, "two": {"rate": 1, "datasets": {"beta": None}}}
    recipe["data"] |= {"mixture": {"groups": groups}, "max_crops": 24, "sequence_length": 1000, "window": 256}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def preview(data: Path, *settings: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    return subprocess.run(
        [sys.executable, *python, "tools/preview_mixture.py", str(data / "recipe.yaml"), "--steps", "20", *options],
        cwd=ROOT,
        env={**os.environ, "MOLMO2_DATA": str(data)},
        capture_output=True,
        text=True,
    )


def test_shares_epochs_and_fill_are_shown(data: Path) -> None:
    done = preview(data)
    assert done.returncode == 0, done.stderr
    shares, storage = done.stdout.split("\nstorage: ")
    rows = {line.split()[0]: line.split()[1:] for line in shares.splitlines() if line}
    alpha, beta = ([float(value.replace(",", "")) for value in rows[name]] for name in ("alpha", "beta"))
    assert (alpha[0], beta[0]) == (20, 5)
    assert (alpha[1], beta[1]) == (75, 25)
    assert alpha[2] == pytest.approx(75, abs=5) and alpha[2] + beta[2] == pytest.approx(100, abs=0.02)
    assert alpha[3] + beta[3] == pytest.approx(100, abs=0.02)
    assert beta[7] == pytest.approx(alpha[7] * 20 / 5 / 3, rel=0.01)
    steps = yaml.safe_load((data / "recipe.yaml").read_text())["train"]["steps"]
    assert alpha[6] * alpha[7] == pytest.approx(steps, rel=0.1)  # steps per epoch are printed to a tenth
    fill = re.search(r"fill: ([\d.]+)% of 1,000 tokens .*, ([\d.]+)% of 24 crops", done.stdout)
    assert fill and 50 < float(fill[1]) <= 100
    assert re.search(r"^alpha .* local$", storage, re.MULTILINE) and "text-only samples are" in storage


def test_no_torch_is_needed(data: Path) -> None:
    """The tool runs where torch cannot be imported at all."""
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = preview(data, python=("-c", code))
    assert done.returncode == 0, done.stderr
    assert "alpha" in done.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.mixture.groups.one.datasets.gamma=null", "dataset gamma is in none of"),
        ("data.sequence_length=64", "dataset alpha: "),
        ("data.colour=1", "data.colour: unknown key"),
    ],
)
def test_mistakes_end_in_one_message(data: Path, setting: str, message: str) -> None:
    done = preview(data, setting)
    assert done.returncode == 1
    assert done.stderr.startswith("preview_mixture: ") and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
