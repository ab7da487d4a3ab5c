"""Whole shards of small datasets from a bucket, kept on the disk: right bytes, a bound, nobody waits, nothing half."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from far_storage import FarStorage, draws, open_dataset_of
from toy import LAYOUT, write_dataset

import shards.stream.cache
from shards.storage.base import take_tally
from shards.storage.local import LocalStorage, cache_dir
from shards.stream.cache import ShardCache, with_cache
from shards.stream.dataset import Dataset
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, PlanSettings, open_plan
from shards.stream.reader import Damage, StoredSample, read_sample


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A dataset of three shards that is not on a local disk, as far as the readers know."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards.stream.cache, "_NOT_BEFORE", {})
    write_dataset(tmp_path / "bucket", "toy", 24, per_shard=8)
    found = open_dataset_of(tmp_path / "bucket")
    FarStorage.reads = 0
    take_tally()
    return found


def shard_files() -> list[Path]:
    return sorted(path for path in (cache_dir() / "shards").glob("*") if path.name != ".lock")


def finished() -> list[Path]:
    return [path for path in shard_files() if path.suffix == ".tar"]


def size_of(dataset: Dataset) -> int:
    return sum(shard.bytes for shard in dataset.index.shards)


def test_a_shard_is_fetched_once_for_all_its_samples(far: Dataset) -> None:
    (tars,) = with_cache([far], 1 << 30)
    for _ in range(2):
        for each in draws(far):
            assert isinstance(read_sample(tars, each), StoredSample)
    assert FarStorage.reads == len(far.sidecars) == 3
    assert take_tally()["cache_hits"] == 2 * len(far)
    assert [path.name for path in shard_files()] == sorted(f"{shard.sha256}.tar" for shard in far.index.shards)


def test_the_smallest_datasets_that_fit_whole_are_kept(far: Dataset) -> None:
    larger = replace(far, name="larger", index=far.index.model_copy(update={"shards": far.index.shards * 2}))

    def kept(budget: int) -> list[str]:
        return [tars.name for tars in with_cache([larger, far], budget) if tars.cache is not None]

    assert kept(3 * size_of(far)) == ["larger", "toy"]
    assert kept(3 * size_of(far) - 1) == kept(size_of(far)) == ["toy"]
    assert kept(size_of(far) - 1) == []
    near = replace(far, storage=LocalStorage(far.storage.root))
    assert with_cache([near], 1 << 30)[0].cache is None, "a local disk needs no copy"


def test_wrong_bytes_in_the_cache_are_fetched_past_it(far: Dataset) -> None:
    (tars,) = with_cache([far], 1 << 30)
    for each in draws(far):
        read_sample(tars, each)
    for path in shard_files():
        data = bytearray(path.read_bytes())
        data[1000:] = bytes(len(data) - 1000)
        path.write_bytes(data)
    assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert take_tally()["retries"] >= 3


def test_a_shard_that_is_not_the_one_of_the_index_is_not_kept(far: Dataset) -> None:
    tar = Path(far.storage.root) / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512] + bytes(511) + b"x")  # the padding of the last sample
    (tars,) = with_cache([far], 1 << 30)
    found = [read_sample(tars, each) for each in draws(far)]
    assert not any(isinstance(each, Damage) for each in found)  # no sample is wrong, so all are used
    assert f"{far.index.shards[1].sha256}.tar" not in {path.name for path in shard_files()}
    assert FarStorage.reads < 2 + 8 + 2 + 8, "it was not fetched again for every sample"


def test_room_is_made_of_what_nobody_uses(far: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [shard.bytes for shard in far.index.shards]
    cache = ShardCache(cache_dir() / "shards", sizes[0] + sizes[1])

    def read(shard: int) -> None:
        info = far.index.shards[shard]
        data = cache.read(far.storage, f"{info.name}.tar", info.bytes, info.sha256, 512, 100)
        assert data == far.storage.read(f"{info.name}.tar", 512, 100)

    names = [f"{info.sha256}.tar" for info in far.index.shards]
    read(0)
    read(1)
    read(2)  # both others are in use
    assert {path.name for path in shard_files()} == {names[0], names[1]}
    old = time.time() - 2 * shards.stream.cache.IDLE
    os.utime(shard_files()[0].with_name(names[0]), (old, old))
    monkeypatch.setattr(shards.stream.cache, "_NOT_BEFORE", {})
    read(2)
    assert {path.name for path in shard_files()} == {names[1], names[2]}
    read(0)  # gone, no room: from the bucket


def test_nobody_waits_for_another_fetch(far: Dataset) -> None:
    (tars,) = with_cache([far], 1 << 30)
    folder = cache_dir() / "shards"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        since = time.monotonic()
        assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
        assert time.monotonic() - since < 20
    assert FarStorage.reads == len(far)
    assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert FarStorage.reads == len(far) + 3


def test_nobody_waits_for_a_large_shard(far: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stream.cache, "SMALL_SHARD", 0)
    gate, read = threading.Event(), FarStorage.read

    def slow(self: FarStorage, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if threading.current_thread().name.startswith("fetch"):
            assert gate.wait(60)
        return read(self, name, offset, length)

    monkeypatch.setattr(FarStorage, "read", slow)
    (tars,) = with_cache([far], 1 << 30)
    for _ in range(2):
        assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert FarStorage.reads == 2 * len(far) and not finished()
    gate.set()
    until = time.monotonic() + 60
    while len(finished()) < 3 or shards.stream.cache._UNDER_WAY:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert FarStorage.reads == 2 * len(far) + 3, "each was fetched once"
    assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert FarStorage.reads == 2 * len(far) + 3


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import shards.stream.cache
from far_storage import FarStorage, draws, open_dataset_of
from shards.storage.local import cache_dir
from shards.stream.cache import ShardCache
read = FarStorage.read
def slow(self, name, offset=0, length=None):
    print("reading", flush=True)
    time.sleep(0.05)
    return read(self, name, offset, length)
FarStorage.read = slow
shards.stream.cache.CHUNK = 2048
far = open_dataset_of(Path(sys.argv[1]))
info = far.index.shards[0]
cache = ShardCache(cache_dir() / "shards", 1 << 30)
cache.read(far.storage, "000000.tar", info.bytes, info.sha256, 0, 9)
"""


@pytest.mark.parametrize("reads", [1, 4])
def test_killed_while_a_shard_is_fetched(far: Dataset, tmp_path: Path, reads: int) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "bucket"), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(reads):
            assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGKILL)
    assert not finished()
    assert [path for path in shard_files() if path.suffix == ".tmp"]
    (tars,) = with_cache([far], 1 << 30)
    assert all(isinstance(read_sample(tars, each), StoredSample) for each in draws(far))
    assert len(finished()) == 3
    assert not [path for path in shard_files() if path.suffix == ".tmp"]


def read_all(root: str, budget: int, times: int) -> None:
    """Entry of a process: every sample through a cache that holds one shard."""
    far = open_dataset_of(Path(root))
    cache = ShardCache(cache_dir() / "shards", budget)
    shards.stream.cache.IDLE, shards.stream.cache.AGAIN = 0.0, 0.0
    rng = np.random.Generator(np.random.Philox(os.getpid()))
    found = draws(far)
    for number in rng.integers(0, len(found), times):
        each = found[number]
        info = far.index.shards[each.shard]
        data = cache.read(far.storage, f"{info.name}.tar", info.bytes, info.sha256, each.offset, each.span)
        assert data == far.storage.read(f"{info.name}.tar", each.offset, each.span)
        assert len(list(cache.folder.glob("*.tar"))) <= 1


def test_processes_with_a_tiny_budget_neither_wait_nor_err(far: Dataset, tmp_path: Path) -> None:
    budget = max(shard.bytes for shard in far.index.shards)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(str(tmp_path / "bucket"), budget, 150)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_batches_do_not_depend_on_the_cache(far: Dataset, tmp_path: Path) -> None:
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"toy": None}}}})
    plan = open_plan([str(tmp_path / "bucket")], mixture, PlanSettings(
        sequence_length=512, max_crops=64, packs_per_step=2, window=32,
    ))  # fmt: skip
    wanted = [batch for _, batch in zip(range(8), make_loader(plan, Cursor(), LAYOUT), strict=False)]
    plan.datasets = (far,)
    for ours, batch in zip(make_loader(plan, Cursor(), LAYOUT, cache=1 << 30), wanted, strict=False):
        assert ours.input_ids.equal(batch.input_ids) and ours.pixels.equal(batch.pixels)
    assert shard_files()
    shutil.rmtree(cache_dir())
