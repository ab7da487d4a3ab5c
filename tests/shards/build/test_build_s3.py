"""Building into a bucket of a real S3 server: the bytes of a build on a disk, whatever is killed in between."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_cases import build, build_part, catalog, tree
from s3_server import BUCKET, Server, client, environment

import shards.storage.ranged
import shards.storage.s3
from shards.build.claim import BUILD_NAME, BuildError
from shards.build.repair import repair_dataset
from shards.build.verify import Finding, verify_dataset
from shards.format import INDEX_NAME
from shards.storage.open import open_storage
from shards.stream.dataset import open_dataset
from tools.build_shards import write_report_json

SCRIPT = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[5]); from build_cases import build_part\n"
    "build_part(Path(sys.argv[1]), sys.argv[2], 'demo-cap', task_of=(int(sys.argv[3]), int(sys.argv[4])))"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("weed"))
    try:
        server.start()
        client(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**environment(server.endpoint), "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for cached in (shards.storage.s3._new_client, shards.storage.s3._presigned, shards.storage.ranged.connections):
        cached.cache_clear()


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of demo-cap as one run of one process makes them on a disk."""
    out = tmp_path_factory.mktemp("whole")
    build(raw, out, "demo-cap")
    return {name: data for name, data in tree(out).items() if not name.endswith(".lock")}


def objects(url: str) -> dict[str, bytes]:
    """What lies below a URL, by name, as `tree` gives it of a folder."""
    store = open_storage(url)
    return {name: store.read(name) for name in store.list()}


def start(raw: Path, url: str, rank: int, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(raw), url, str(rank), str(number), str(Path(__file__).parents[1])]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_of_several_writers_one_creates(bucket: None) -> None:
    store = open_storage(f"s3://{BUCKET}/create")
    assert store.create("a", b"first") and not store.create("a", b"second")
    assert store.read("a") == b"first"
    store.remove("a")
    store.remove("a")
    assert store.create("a", b"third")


def test_tasks_that_are_killed_end_with_the_bytes_of_a_disk(raw: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    url, draw, killed = f"s3://{BUCKET}/tasks", random.Random(2), 0
    for _ in range(2):
        tasks = [start(raw, url, rank, 2) for rank in range(2)]
        before, deadline = len(open_storage(url).list()), time.monotonic() + 60
        while len(open_storage(url).list()) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))
        for task in tasks:
            task.kill()
            killed += task.wait() < 0
    assert killed >= 1
    assert INDEX_NAME not in {name.rsplit("/", 1)[-1] for name in objects(url)}
    tasks = [start(raw, url, rank, 2) for rank in range(2)]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    built = build_part(raw, url, "demo-cap")
    assert built.index is not None and built.num_made == 0
    assert objects(url) == whole
    findings = [found for found in verify_dataset(f"{url}/demo-cap") if isinstance(found, Finding)]
    assert not findings
    assert len(open_dataset(url, "demo-cap")) == built.index.totals.samples
    again = build_part(raw, url, "demo-cap")
    assert again.num_made == 0 and objects(url) == whole


@pytest.mark.slow
def test_other_settings_are_refused_unless_it_is_meant(raw: Path) -> None:
    url, other = f"s3://{BUCKET}/settings", catalog("sft", examples_per_shard=5).stages["sft"]
    build_part(raw, url, "demo-chat")
    with pytest.raises(BuildError, match=r"s3://bucket/settings/demo-chat was built with other settings: settings\."):
        build_part(raw, url, "demo-chat", settings=other)
    first = objects(f"{url}/demo-chat")
    build_part(raw, url, "demo-chat", settings=other, overwrite=True)
    assert objects(f"{url}/demo-chat")[BUILD_NAME] != first[BUILD_NAME]


@pytest.mark.slow
def test_a_mark_that_changes_meanwhile_stops_before_the_index(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine overwrites the place while this build is at work: a bucket has no lock."""
    from shards.build import builder

    url, check = f"s3://{BUCKET}/meanwhile", builder._write_rejects

    def overtaken(storage: object, parts: object) -> None:
        check(storage, parts)  # type: ignore[arg-type]
        open_storage(f"{url}/demo-chat").write(BUILD_NAME, b"{}")

    monkeypatch.setattr(builder, "_write_rejects", overtaken)
    with pytest.raises(BuildError, match="was built with other settings"):
        build_part(raw, url, "demo-chat")
    assert INDEX_NAME not in objects(f"{url}/demo-chat")


def test_a_lost_server_is_one_error_and_the_next_try_goes_on(
    raw: Path, server: Server, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.build import builder

    url, check, seen = f"s3://{BUCKET}/lost", builder._check_budget, []

    def lost(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        seen.append(1)
        if len(seen) == 3:
            server.kill()

    shards.storage.s3._new_client.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(shards.storage.s3, "ATTEMPTS", 2)  # eight, with botocore's pauses between them, take 20 s
        patch.setattr(builder, "_check_budget", lost)
        with pytest.raises(BuildError, match="the same command continues: finished shards are kept"):
            build_part(raw, url, "demo-cap")
    server.start()
    shards.storage.s3._new_client.cache_clear()
    built = build_part(raw, url, "demo-cap")
    assert built.num_kept >= 1 and objects(url) == whole


def test_the_report_says_what_was_made_and_left_out(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build_part(raw, tmp_path / "out", "demo-cap")
    write_report_json("sft/demo-cap", built, (0, 1), str(tmp_path / "out/demo-cap"), 2.0)
    told = json.loads((tmp_path / "out/demo-cap/report.json").read_text())
    assert built.index is not None
    assert told["samples"] == built.index.totals.samples > 0
    assert told["made"] == {"shards": built.num_made, "seconds": 2.0, "samples_per_second": told["samples"] / 2}
    assert sum(told["left_out"].values()) == built.index.totals.rejects
    assert f"{told['samples']} samples" in capsys.readouterr().out
    again = build_part(raw, tmp_path / "out", "demo-cap")
    assert again.num_made == 0, "the report is no part of the build"
    write_report_json("sft/demo-cap", again, (0, 1), str(tmp_path / "out/demo-cap"), 9.0)
    assert json.loads((tmp_path / "out/demo-cap/report.json").read_text()) == told, "the figures of the first run stay"


@pytest.mark.parametrize("with_copy", [False, True])
def test_repair_in_a_bucket_is_that_on_a_disk(whole: dict[str, bytes], tmp_path: Path, with_copy: bool) -> None:
    url, near, intact = f"s3://{BUCKET}/repair-{with_copy}", tmp_path / "near", tmp_path / "intact"
    damaged = {name: bytearray(data) for name, data in whole.items()}
    damaged["demo-cap/000001.tar"][5000] ^= 0x40
    del damaged["demo-cap/000002.idx.npy"]
    for name, data in damaged.items():
        open_storage(url).write(name, bytes(data))
        open_storage(near).write(name, bytes(data))
    for name, data in whole.items():
        open_storage(intact).write(name, data)
    copy = open_storage(intact / "demo-cap") if with_copy else None
    done = list(repair_dataset(f"{url}/demo-cap", copy))
    assert done == list(repair_dataset(near / "demo-cap", copy))
    assert {repaired.shard for repaired in done} == {"000001", "000002"}
    assert [len(repaired.dropped) for repaired in done] == ([0, 0] if with_copy else [1, 0])
    assert objects(url) == tree(near)
    assert (objects(url)["demo-cap/000001.tar"] == whole["demo-cap/000001.tar"]) is with_copy
    assert not [found for found in verify_dataset(f"{url}/demo-cap") if isinstance(found, Finding)]
