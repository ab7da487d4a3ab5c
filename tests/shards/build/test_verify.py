"""Verification: a whole dataset has no finding, and every kind of damage is found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from build_cases import build
from fork_server import python

from shards.build.verify import Finding, find_datasets, verify_dataset
from shards.build.writer import npy_bytes
from shards.format import span_hash, tar_members
from shards.media.jpeg import encode_jpeg


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    build(raw, out, "demo-chat")
    build(raw, out, "demo-cap")
    return out


def findings(folder: Path) -> list[str]:
    return [
        str(found)
        for data in find_datasets(str(folder))
        for found in verify_dataset(data)
        if isinstance(found, Finding)
    ]


def test_whole_datasets_have_no_finding(whole: Path) -> None:
    assert len(find_datasets(str(whole))) == 2
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
        lambda d: (d / "index.json").write_text((d / "index.json").read_text().replace('_version": 2', '_version": 9')),
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
    folder = tmp_path / "demo-chat"
    shutil.copytree(whole / "demo-chat", folder)
    rows = np.load(folder / "000000.idx.npy")
    rows["num_tokens"][3, 1] += 1
    np.save(folder / "000000.idx.npy", rows)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["index_sha256"] = hashlib.sha256((folder / "000000.idx.npy").read_bytes()).hexdigest()
    index["totals"]["crops"] += 1
    (folder / "index.json").write_text(json.dumps(index))
    first, *rest = findings(tmp_path)
    assert "variant 1: num_tokens" in first
    assert len(rest) == 2
    assert re.search(r"\d+ annotations, the index says \d+", rest[0])  # the sample above counts for none
    assert "0 crops, the index says 1" in rest[1]


def rewritten(folder: Path, shard: str, samples: list[dict[str, Any]], rows: np.ndarray) -> None:
    """Write other samples in place of a shard, with all hashes of tar, sidecar and index true."""
    with open(folder / f"{shard}.tar", "wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for row, sample in zip(rows, samples, strict=True):
            row["offset"] = writer.tarstream.offset
            writer.write(sample)
            row["span"] = writer.tarstream.offset - int(row["offset"])
    data = (folder / f"{shard}.tar").read_bytes()
    for row in rows:
        row["xxh64"] = span_hash(data[row["offset"] : row["offset"] + row["span"]])
    np.save(folder / f"{shard}.idx.npy", rows)
    index = json.loads((folder / "index.json").read_text())
    (entry,) = [entry for entry in index["shards"] if entry["name"] == shard]
    entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    entry["index_sha256"] = hashlib.sha256((folder / f"{shard}.idx.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


def other_key(sample: dict[str, Any]) -> None:
    sample["__key__"] = "demo-cap-99999999"


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not a JPEG": (lambda s: s.update({"000.jpg": b"\xff\xd8 no"}), "ValueError"),
    "image of another size": (
        lambda s: s.update({"000.jpg": encode_jpeg(np.zeros((9, 9, 3), np.uint8))}),
        "image 0 is",
    ),
    "a member missing": (lambda s: s.pop("tokens2.npy"), "tokens2.npy"),
    "a member too many": (lambda s: s.update({"extra.txt": b"x"}), "extra.txt"),
    "not JSON": (lambda s: s.update({"json": b"{"}), "JSONDecodeError"),
    "tokens of another dtype": (lambda s: s.update({"tokens0.npy": npy_bytes(np.arange(3))}), "no .npy rows of"),
    "another key": (other_key, "key_hash is another key's"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_content_that_is_wrong_under_true_hashes_is_found(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "demo-cap"
    shutil.copytree(whole / "demo-cap", folder)
    rows, data = np.load(folder / "000001.idx.npy"), (folder / "000001.tar").read_bytes()
    samples = []
    for row in rows:
        members = tar_members(data[row["offset"] : row["offset"] + row["span"]])
        key = next(iter(members)).split(".")[0]
        samples.append({"__key__": key, **{name.split(".", 1)[1]: value for name, value in members.items()}})
    rewritten(folder, "000001", samples, rows)
    assert [line for line in findings(tmp_path) if "bytes, the index says" not in line] == []
    change, match = CONTENTS[kind]
    change(samples[3])
    rewritten(folder, "000001", samples, rows)
    found = [line for line in findings(tmp_path) if "000001.tar" in line]
    assert len(found) == 1
    assert re.search(match, found[0])


def test_a_key_that_occurs_twice_is_found(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo-cap"
    shutil.copytree(whole / "demo-cap", folder)
    for suffix in ("tar", "idx.npy"):
        shutil.copy(folder / f"000000.{suffix}", folder / f"000001.{suffix}")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1] = index["shards"][0] | {"name": "000001"}
    (folder / "index.json").write_text(json.dumps(index))
    assert sum("key occurs twice, first in 000000.tar" in line for line in findings(tmp_path)) == 8


@pytest.mark.slow
def test_the_command_exits_with_1_on_damage(whole: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[3] / "tools" / "verify_shards.py"
    good = subprocess.run([python(), tool, whole], capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "2 datasets" in good.stdout
    shutil.copytree(whole / "demo-chat", tmp_path / "demo-chat")
    patched(tmp_path / "demo-chat" / "000000.tar", 700, b"\xff\xfe")
    bad = subprocess.run([python(), tool, tmp_path], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "DAMAGED demo-chat / 000000.tar" in bad.stdout
