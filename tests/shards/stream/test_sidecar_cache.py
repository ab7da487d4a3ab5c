"""The cache of sidecars from a bucket, shared by processes that are killed or that come at the same time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET, Exchange, Proxy, environment, faulty_proxy, s3_server, upload
from toy import write_dataset

SAMPLES, SHARDS = 24, 3
ROOT = f"s3://{BUCKET}/shards/sft"
OPEN = f"""
import hashlib
from shards.stream.dataset import open_dataset
print(hashlib.sha256(b"".join(rows.tobytes() for rows in open_dataset({ROOT!r}, "one").sidecars)).hexdigest())
"""
# Killed when the bytes are in the temporary file and not yet in their place.
DIE_BEFORE_REPLACE = "import os, signal\nos.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An endpoint with a dataset, and its files on the disk."""
    with s3_server(tmp_path_factory.mktemp("weed")) as endpoint:
        folder = write_dataset(tmp_path_factory.mktemp("shards"), "one", SAMPLES, per_shard=SAMPLES // SHARDS)
        upload(endpoint, folder, "shards/sft/one")
        yield endpoint, folder


@pytest.fixture
def proxy(server: tuple[str, Path]) -> Iterator[Proxy]:
    with faulty_proxy(server[0]) as proxy:
        yield proxy


def opener(proxy: Proxy, cache: Path, code: str = OPEN) -> subprocess.Popen[str]:
    """A process that opens the dataset through the proxy."""
    endpoint = f"http://127.0.0.1:{proxy.server_port}"
    variables = os.environ | environment(endpoint) | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def entries(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.npy")}


def wanted(folder: Path) -> dict[str, bytes]:
    """What the cache holds in the end: sidecars by their sha256."""
    files = [path.read_bytes() for path in folder.glob("*.idx.npy")]
    return {f"{hashlib.sha256(data).hexdigest()}.npy": data for data in files}


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_in_a_download_and_started_again(
    server: tuple[str, Path], proxy: Proxy, tmp_path: Path, number: int
) -> None:
    """kill -9 while the body of a sidecar drips in: of that one nothing is kept."""

    def drip(exchange: Exchange) -> None:
        if f"{number:06d}.idx.npy" in exchange.path:
            exchange.pause = 0.05

    proxy.faults.append(drip)
    process = opener(proxy, tmp_path)
    until(lambda: any(f"{number:06d}.idx.npy" in line for line in proxy.log), process)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept, slow = entries(tmp_path), server[1] / f"{number:06d}.idx.npy"
    assert f"{hashlib.sha256(slow.read_bytes()).hexdigest()}.npy" not in kept
    assert kept.items() < wanted(server[1]).items()
    proxy.faults.clear()
    proxy.log.clear()
    assert finished(opener(proxy, tmp_path))
    assert entries(tmp_path) == wanted(server[1])
    assert sum(".idx.npy" in line for line in proxy.log) == SHARDS - len(kept)  # what was whole is not fetched again


def test_killed_before_the_file_is_in_its_place(server: tuple[str, Path], proxy: Proxy, tmp_path: Path) -> None:
    process = opener(proxy, tmp_path, DIE_BEFORE_REPLACE + OPEN)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert entries(tmp_path) == {}
    assert list(tmp_path.rglob(".*.tmp"))
    finished(opener(proxy, tmp_path))
    assert entries(tmp_path) == wanted(server[1])


def test_processes_that_fetch_the_same_sidecars_do_not_hinder_each_other(
    server: tuple[str, Path], proxy: Proxy, tmp_path: Path
) -> None:
    """Both drip in at the same time; each ends with the right rows, and one copy of each is kept."""
    proxy.faults.append(lambda exchange: setattr(exchange, "pause", 0.001) if ".idx.npy" in exchange.path else None)
    both = [opener(proxy, tmp_path) for _ in range(2)]
    first, second = (finished(process) for process in both)
    rows = b"".join(np.load(path).tobytes() for path in sorted(server[1].glob("*.idx.npy")))
    assert first == second == f"{hashlib.sha256(rows).hexdigest()}\n"
    assert entries(tmp_path) == wanted(server[1])
    assert not list(tmp_path.rglob(".*.tmp"))
