"""What a step held, said afterwards: its packs in words, and losses that add up to the one in the log."""

import os
import re
import shutil
from pathlib import Path

import pytest
import toy_run
from train_runs import log, train

pytestmark = pytest.mark.dist
SAMPLE = re.compile(r"  toy/000000/(\d+) variant \d: .* weight ([\d.]+), loss ([\d.]+)")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replay")
    toy_run.build_toy(root)
    recipe = toy_run.write_recipe(root / "r.yaml", "r", steps=6, checkpoint_every=3, keep_last=9, residual_dropout=0)
    train(root, recipe)
    return root


@pytest.mark.parametrize("step", [1, 4])
def test_the_losses_of_samples_add_up_to_the_step(root: Path, step: int) -> None:
    output = train(root, root / "r.yaml", "--replay", str(step), ranks=1)
    assert f"step {step} under the weights of step {step - 1}\n" in output
    found = [(float(weight), float(loss)) for _, weight, loss in SAMPLE.findall(output)]
    mean = sum(weight * loss for weight, loss in found) / sum(weight for weight, _ in found)
    assert mean == pytest.approx(log(root, "r")[step - 1]["loss"], rel=2e-4)
    assert output.count(f"step {step}, pack ") == 4


def test_updates_that_are_missing_are_told(root: Path) -> None:
    output = train(root, root / "r.yaml", "--replay", "6", ranks=1)
    assert "step 6 under the weights of step 3: 2 updates before it are not in them" in output


def test_a_step_is_shown_in_words(root: Path) -> None:
    first = train(root, root / "r.yaml", "--inspect", ranks=1)
    assert "step 1, pack 0: " in first and "and 1 more packs in this step" in first
    assert "[1] user: " in first and "assistant: a square" in first
    assert "sees image" in first and "sees text alone" in first
    later = train(root, root / "r.yaml", "--inspect", "5", ranks=1)
    assert "step 5, pack 0: " in later
    assert re.search(r"^toy +24 +100\.00 +100\.00 ", first, re.MULTILINE)
    assert "every one of the 1 shard files is there" in first
    assert "the first one is 1" in train(root, root / "r.yaml", "--inspect", "0", ranks=1, code=1)


def test_a_look_at_a_step_names_every_shard_file_that_is_not_whole(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "raw", tmp_path / "raw")
    shutil.copytree(root / "shards", tmp_path / "shards")
    tar = tmp_path / "shards/sft/toy/000000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    output = train(tmp_path, root / "r.yaml", "--inspect", ranks=1, code=1)
    assert f"{tar}: {size - 512:,} bytes, {size:,} in index.json" in output and "step 1, pack 0" not in output
    tar.unlink()
    held_out = "eval={roots: [shards/sft], datasets: [toy]}"
    output = train(tmp_path, root / "r.yaml", "--inspect", "--set", held_out, ranks=1, code=1)
    assert output.count(f"{tar}: missing") == 1 and "fetch or build them again" in output
    assert "Traceback" not in output
