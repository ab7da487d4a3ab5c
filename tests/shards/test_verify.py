"""Verification: a whole dataset has no finding, and every kind of damage is found and named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_cases import build

from shards.verify import Finding, find_datasets, verify_dataset


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    build(raw, out, "demo-chat")
    build(raw, out, "demo-cap")
    return out


def findings(folder: Path) -> list[str]:
    return [
        str(found) for data in find_datasets(folder) for found in verify_dataset(data) if isinstance(found, Finding)
    ]


def test_whole_datasets_have_no_finding(whole: Path) -> None:
    assert len(find_datasets(whole)) == 2
    assert findings(whole) == []


def patched(path: Path, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (
        lambda d: patched(d / "000001.tar", 1500, b"\xff"),
        r"000001.tar / demo-chat-\d+ / byte 0: checksum",
    ),
    "cut tar": (lambda d: (d / "000000.tar").write_bytes((d / "000000.tar").read_bytes()[:2048]), "cut short"),
    "missing tar": (lambda d: (d / "000000.tar").unlink(), "missing file"),
    "missing index": (lambda d: (d / "index.json").unlink(), "no index.json"),
    "other sidecar": (lambda d: shutil.copy(d / "000000.idx.npy", d / "000001.idx.npy"), "another sha256"),
    "extra shard": (lambda d: shutil.copy(d / "000000.tar", d / "000007.tar"), "not in the index"),
    "foreign version": (
        lambda d: (d / "index.json").write_text((d / "index.json").read_text().replace('_version": 1', '_version": 9')),
        "format version 9",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "demo-chat"
    shutil.copytree(whole / "demo-chat", folder)
    damage, match = DAMAGES[kind]
    damage(folder)
    found = findings(tmp_path)
    assert found
    assert any(re.search(match, line) for line in found), found


def test_lengths_that_lie_are_found(whole: Path, tmp_path: Path) -> None:
    """Hashes all agree, but the sidecar promises another number of tokens."""
    import hashlib

    folder = tmp_path / "demo-chat"
    shutil.copytree(whole / "demo-chat", folder)
    rows = np.load(folder / "000000.idx.npy")
    rows["num_tokens"][3, 1] += 1
    np.save(folder / "000000.idx.npy", rows)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["index_sha256"] = hashlib.sha256((folder / "000000.idx.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    (line,) = findings(tmp_path)
    assert "variant 1: num_tokens" in line


def test_the_command_exits_with_1_on_damage(whole: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "verify_shards.py"
    good = subprocess.run([sys.executable, tool, whole], capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "2 datasets" in good.stdout
    shutil.copytree(whole / "demo-chat", tmp_path / "demo-chat")
    patched(tmp_path / "demo-chat" / "000000.tar", 700, b"\xff\xfe")
    bad = subprocess.run([sys.executable, tool, tmp_path], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "DAMAGED demo-chat / 000000.tar" in bad.stdout
