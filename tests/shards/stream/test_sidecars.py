"""Sidecars are hashed once per machine; whatever has changed since is hashed again; no file stays open."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import write_dataset, write_lengths

from shards.format import FormatError
from shards.stream import sidecars
from shards.stream.dataset import open_dataset

SHARDS = 40


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset whose files count as old, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_lengths(tmp_path / "first", "d", np.full((80, 2), 9), np.zeros((80, 2)), num_shards=SHARDS)
    (tmp_path / "first").rename(tmp_path / "moved")  # nothing is known of this path yet
    monkeypatch.setattr(sidecars, "RECENT", -1.0)
    return tmp_path / "moved"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []
    plain = sidecars._sha256

    def spy(path: Path) -> str | None:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(sidecars, "_sha256", spy)
    return names


def test_only_the_first_opening_hashes(root: Path, hashed: list[str]) -> None:
    first = open_dataset(str(root), "d")
    assert len(hashed) == SHARDS
    again = open_dataset(str(root), "d")
    assert len(hashed) == SHARDS
    assert all(np.array_equal(a, b) for a, b in zip(first.sidecars, again.sidecars, strict=True))
    assert len(again) == 80


def test_a_change_is_found_even_with_the_old_size_and_time(root: Path, hashed: list[str]) -> None:
    open_dataset(str(root), "d")
    hashed.clear()
    file = root / "d/000007.idx.npy"
    data, times = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(FormatError, match=r"000007.idx.npy: cannot be used: sha256"):
        open_dataset(str(root), "d")
    assert hashed == ["000007.idx.npy"]
    file.unlink()
    with pytest.raises(FormatError, match=r"000007.idx.npy: cannot be used: no such file"):
        open_dataset(str(root), "d")


def test_a_file_that_was_just_written_is_hashed_again(
    root: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecars, "RECENT", 3600.0)
    for _ in range(2):
        open_dataset(str(root), "d")
    assert len(hashed) == 2 * SHARDS


@pytest.mark.parametrize("content", ["", "[1]", '{"000000.idx.npy": 7}', "{"])
def test_a_damaged_memory_is_no_memory(root: Path, hashed: list[str], content: str, tmp_path: Path) -> None:
    open_dataset(str(root), "d")
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert len(json.loads(file.read_bytes())) == SHARDS
    file.write_text(content)
    open_dataset(str(root), "d")
    assert len(hashed) == 2 * SHARDS


def test_without_a_cache_folder_every_opening_hashes(
    root: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        open_dataset(str(root), "d")
    assert len(hashed) == 2 * SHARDS


def test_no_file_stays_open(root: Path) -> None:
    """A stage has more shards than a process may have open files, 1,024 by default."""
    before = len(os.listdir("/proc/self/fd"))
    dataset = open_dataset(str(root), "d")
    assert len(os.listdir("/proc/self/fd")) == before
    assert sum(int(rows["num_tokens"].sum()) for rows in dataset.sidecars) == 80 * 2 * 9


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))  # the usual soft limit, which cannot be raised here
import numpy as np
from shards.stream.dataset import open_dataset
from shards.stream.plan import draws_of
from shards.stream.reader import StoredSample, read_sample
dataset = open_dataset(sys.argv[1], "toy")
draws = draws_of(dataset, np.arange(len(dataset)))
samples = [read_sample(dataset.tars, draw) for draw in draws]
print(len(dataset.sidecars), len({sample.key for sample in samples if isinstance(sample, StoredSample)}))
"""


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    """Each sidecar held a descriptor: 1,500 shards ended in "Too many open files"."""
    folder = write_dataset(tmp_path, "toy", 3, per_shard=1)
    index = json.loads((folder / "index.json").read_text())
    for number in range(3, 1500):  # copies of the first three
        for suffix in (".tar", ".idx.npy"):
            os.link(folder / f"{number % 3:06d}{suffix}", folder / f"{number:06d}{suffix}")
        index["shards"].append(index["shards"][number % 3] | {"name": f"{number:06d}"})
    (folder / "index.json").write_text(json.dumps(index))
    command = [sys.executable, "-c", MANY, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.split() == ["1500", "3"]
