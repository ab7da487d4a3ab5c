"""Repair: from a copy, by dropping what is damaged, from the tars alone; killed in between, it goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_cases import build, tree
from fork_server import python
from webdataset.tariterators import group_by_keys, tar_file_expander

from shards.build.repair import LOG_NAME, SET_ASIDE, RepairError, repair_dataset
from shards.build.verify import Finding, verify_dataset
from shards.format import INDEX_NAME
from shards.storage.local import LocalStorage

TOOL = Path(__file__).parents[3] / "tools" / "verify_shards.py"


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "sft"
    build(raw, out, "demo-cap")
    return out


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "sft")
    return tmp_path / "sft" / "demo-cap"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def offsets(folder: Path, shard: str = "000001") -> list[int]:
    return [int(row["offset"]) for row in np.load(folder / f"{shard}.idx.npy")]


def findings(folder: Path) -> list[str]:
    return [str(found) for found in verify_dataset(str(folder)) if isinstance(found, Finding)]


def keys(folder: Path) -> list[str]:
    """As plain webdataset reads them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as file:
            sources = [{"url": str(path), "stream": file}]
            found += [sample["__key__"] for sample in group_by_keys(tar_file_expander(sources))]
    return found


def index_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text())
    return loaded


CASES: dict[str, tuple[Callable[[Path], object], int]] = {  # the damage, and how many samples it costs
    "a flipped byte": (lambda d: flip(d / "000001.tar", offsets(d)[1] + 600), 1),
    "a flipped header": (lambda d: flip(d / "000001.tar", offsets(d)[2] + 10), 1),
    "a cut tar": (lambda d: (d / "000001.tar").write_bytes((d / "000001.tar").read_bytes()[: offsets(d)[3] + 512]), 5),
    "a lost shard": (lambda d: (d / "000000.tar").unlink(), 8),
    "a lost sidecar": (lambda d: (d / "000001.idx.npy").unlink(), 0),
    "a changed sidecar": (lambda d: flip(d / "000001.idx.npy", 200), 0),
    "a lost index": (lambda d: (d / INDEX_NAME).unlink(), 0),
    "all indexes lost": (lambda d: [path.unlink() for path in [d / INDEX_NAME, *d.glob("*.idx.npy")]], 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_whole_stays_and_the_rest_is_dropped(whole: Path, damaged: Path, name: str) -> None:
    damage, lost = CASES[name]
    before, samples = keys(damaged), index_of(damaged)["totals"]["samples"]
    damage(damaged)
    assert findings(damaged)
    done = list(repair_dataset(damaged))
    assert findings(damaged) == []
    assert index_of(damaged)["totals"]["samples"] == samples - lost
    left = keys(damaged)
    assert len(left) == samples - lost and left == [key for key in before if key in set(left)]
    recorded = (damaged / LOG_NAME).read_text().splitlines() if (damaged / LOG_NAME).exists() else []
    assert len(recorded) == sum(len(each.dropped) for each in done) == (1 if name == "a lost shard" else lost)
    if not lost:
        assert (damaged / "000001.tar").read_bytes() == (whole / "demo-cap/000001.tar").read_bytes()
        assert (damaged / "000001.idx.npy").read_bytes() == (whole / "demo-cap/000001.idx.npy").read_bytes()
    assert not (damaged / SET_ASIDE).exists()


def test_a_copy_makes_it_what_it_was(whole: Path, damaged: Path) -> None:
    flip(damaged / "000001.tar", offsets(damaged)[1] + 600)
    (damaged / "000000.tar").unlink()
    flip(damaged / "000002.idx.npy", 200)
    done = list(repair_dataset(damaged, LocalStorage(whole / "demo-cap")))
    assert [(each.shard, each.fetched, each.dropped) for each in done] == [(f"00000{i}", True, ()) for i in range(3)]
    found = tree(damaged)
    assert found.pop(LOG_NAME, b"") == b""
    assert found == tree(whole / "demo-cap")


def test_a_copy_that_is_damaged_too_is_not_believed(whole: Path, damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "demo-cap", tmp_path / "copy")
    for folder in (damaged, tmp_path / "copy"):
        flip(folder / "000001.tar", offsets(folder)[1] + 600)
    (done,) = repair_dataset(damaged, LocalStorage(tmp_path / "copy"))
    assert (done.fetched, len(done.dropped)) == (False, 1)
    assert findings(damaged) == []


@pytest.mark.slow
def test_a_killed_repair_is_continued(whole: Path, damaged: Path, tmp_path: Path) -> None:
    for shard in ("000000", "000001", "000002"):
        flip(damaged / f"{shard}.tar", offsets(damaged, shard)[1] + 600)
    shutil.copytree(damaged, tmp_path / "other")
    list(repair_dataset(tmp_path / "other"))
    running = repair_dataset(damaged)
    next(running)
    next(running)
    running.close()  # as a kill would: two shards are rewritten, no index
    assert not (damaged / INDEX_NAME).exists() and (damaged / SET_ASIDE).exists()
    list(repair_dataset(damaged))
    assert findings(damaged) == []
    found, wanted = tree(damaged), tree(tmp_path / "other")
    found.pop(LOG_NAME), wanted.pop(LOG_NAME)
    assert found == wanted


def test_without_any_index_it_says_what_is_missing(damaged: Path) -> None:
    for name in (INDEX_NAME, "build.json"):
        (damaged / name).unlink()
    with pytest.raises(RepairError, match=r"neither index\.json nor build\.json.*processor's settings"):
        list(repair_dataset(damaged))


@pytest.mark.slow
def test_the_command_line(whole: Path, damaged: Path) -> None:
    flip(damaged / "000001.tar", offsets(damaged)[1] + 600)
    command = [python(), str(TOOL), str(damaged.parent), "--repair", "--from", str(whole)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"REPAIRED {damaged} / 000001.tar: fetched" in run.stdout
    assert "0 findings" in run.stdout
    flip(damaged / "000001.tar", offsets(damaged)[1] + 600)
    run = subprocess.run(command[:-2], capture_output=True, text=True)
    assert run.returncode == 0 and "7 samples kept, 1 findings dropped" in run.stdout


def test_reindexing_believes_the_tars_and_not_the_indexes(damaged: Path, whole: Path) -> None:
    """A shard that somebody took away and one whose sidecar tells something else: neither is damage then."""
    (damaged / "000000.tar").unlink()
    shutil.copy(damaged / "000002.idx.npy", damaged / "000001.idx.npy")
    done = list(repair_dataset(damaged, reindex=True))
    assert all(not each.dropped for each in done)
    assert findings(damaged) == []
    names = [shard["name"] for shard in index_of(damaged)["shards"]]
    assert names == [shard["name"] for shard in index_of(whole / "demo-cap")["shards"]][1:]
    kept = {shard["name"]: shard for shard in index_of(damaged)["shards"]}
    assert all(kept[shard["name"]] == shard for shard in index_of(whole / "demo-cap")["shards"][1:])


def test_a_dataset_of_format_version_1_needs_only_a_new_index(damaged: Path, whole: Path) -> None:
    """Its sidecars had no pairs, and its index no largest lengths; the tars are the same."""
    index = json.loads((damaged / INDEX_NAME).read_bytes())
    for shard in index["shards"]:
        del shard["max_tokens"], shard["max_crops"]
        rows = np.load(damaged / f"{shard['name']}.idx.npy")
        names = [name for name in rows.dtype.names if name != "num_pairs"]
        old = np.zeros(len(rows), [(name, rows.dtype[name]) for name in names])
        for name in names:
            old[name] = rows[name]
        np.save(damaged / f"{shard['name']}.idx.npy", old)
    (damaged / INDEX_NAME).write_text(json.dumps(index | {"format_version": 1}))
    assert "--reindex" in findings(damaged)[0]
    list(repair_dataset(damaged, reindex=True))
    assert tree(damaged.parent) == tree(whole)
    assert findings(damaged) == []
