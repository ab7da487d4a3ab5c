"""Shards in a bucket of a real S3 server, straight and through a proxy that misbehaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import tenacity
from s3_server import (
    BUCKET,
    KEYS,
    LATER_KEYS,
    Exchange,
    Fault,
    answer,
    cut,
    drip,
    endless,
    every_third_works,
    faulty_proxy,
    other_range,
    point_at,
    reset,
    short,
    slow_down,
)
from toy import LAYOUT, make_sample

import shards.storage.ranged
import shards.storage.s3
import shards.stream.reader
from shards.build.verify import Finding, find_datasets, verify_dataset
from shards.storage import ranged
from shards.storage.base import UnavailableError
from shards.storage.open import open_storage
from shards.storage.s3 import S3Storage
from shards.stream.collate import Batch
from shards.stream.dataset import open_dataset
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, PlanSettings, open_plan
from shards.stream.reader import Damage, StoredSample, read_sample

ROOT = f"s3://{BUCKET}/shards/sft"


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    point_at(server, monkeypatch)
    return server


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Fault], list[str]]]:
    """Faults to switch on, and the log of requests."""
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)
    with faulty_proxy(bucket) as proxy:
        point_at(f"http://127.0.0.1:{proxy.server_port}", monkeypatch)
        yield proxy.faults, proxy.log


def draws(name: str = "one") -> list[Draw]:
    """Every sample of a dataset's first shard."""
    dataset = open_dataset(ROOT, name)
    fields = ("offset", "span", "xxh64")
    return [Draw(0, 0, i, 0, *(row[f].item() for f in fields), 0, 0, 0.0) for i, row in enumerate(dataset.sidecars[0])]


@pytest.mark.slow
def test_five_verbs(bucket: str, tmp_path: Path) -> None:
    storage = open_storage(f"s3://{BUCKET}/verbs/")
    storage.write("a/b.bin", b"0123456789")
    storage.write("empty", b"")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3, 4) == b"3456"
    assert storage.read("a/b.bin", 8, 100) == b"89"
    assert storage.read("a/b.bin", 100) == b""
    assert storage.read("empty") == b""
    assert storage.size("a/b.bin") == 10
    assert storage.size("a/c.bin") is None
    (tmp_path / "made").write_bytes(b"x" * (20 << 20))  # goes up in parts
    storage.publish(tmp_path / "made", "c.bin")
    assert not (tmp_path / "made").exists()
    assert storage.size("c.bin") == 20 << 20
    storage.write(".hidden", b"")
    assert storage.list() == ["a/b.bin", "c.bin", "empty"]
    assert storage.list("b.bin") == ["a/b.bin"]
    with pytest.raises(FileNotFoundError, match=r"NoSuchKey.*s3://bucket/verbs/missing"):
        storage.read("missing")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a/../../b", "..", "a//b", "./a"])
def test_names_stay_below_the_root(name: str) -> None:
    with pytest.raises(ValueError, match="unsafe file name"):
        S3Storage("s3://bucket/x").read(name)


def test_an_url_without_a_bucket() -> None:
    with pytest.raises(ValueError, match="no bucket"):
        open_storage("s3:///x")


def test_wrong_keys_are_refused_with_a_remedy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(bucket, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage = open_storage(f"s3://{BUCKET}/x")
    with pytest.raises(PermissionError, match=r"SignatureDoesNotMatch.*check AWS_ACCESS_KEY_ID"):
        storage.read("y")
    with pytest.raises(PermissionError, match="refuses"):
        storage.write("y", b"")


def batches(root: str, workers: int, count: int = 6, **options: int) -> list[Batch]:
    """The first micro-batches of a mixture of both datasets."""
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"one": None, "two": None}}}})
    plan = open_plan([root], mixture, PlanSettings(sequence_length=512, max_crops=64, packs_per_step=2, window=32))
    loader = make_loader(plan, Cursor(), LAYOUT, workers=workers, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {}), (0, {"read_ahead": 0}), (2, {"cache": 1 << 30})])
def test_batches_are_those_of_the_disk(bucket: str, local: Path, workers: int, options: dict[str, int]) -> None:
    for ours, wanted in zip(batches(ROOT, workers, **options), batches(str(local), 0), strict=True):
        assert ours.slots == wanted.slots
        for field in ("input_ids", "labels", "loss_weights", "segment_ids", "pixels", "pooling"):
            assert np.array_equal(getattr(ours, field), getattr(wanted, field)), field
        assert ours.masked == ()


def test_sidecars_are_fetched_once(proxy: tuple[list[Fault], list[str]], local: Path) -> None:
    _, log = proxy
    first = open_dataset(ROOT, "one")
    fetched = [line for line in log if ".idx.npy" in line]
    again = open_dataset(ROOT, "one")
    assert len(fetched) == len(first.sidecars) == 3
    assert [line for line in log if ".idx.npy" in line] == fetched
    assert all(np.array_equal(a, b) for a, b in zip(first.sidecars, again.sidecars, strict=True))


def test_a_damaged_cached_sidecar_is_fetched_again(bucket: str, local: Path) -> None:
    open_dataset(ROOT, "one")
    cached = sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))
    for path in cached:
        path.write_bytes(path.read_bytes()[:-1])
    assert len(open_dataset(ROOT, "one")) == 24
    assert len(cached) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [slow_down, reset, cut, short, endless, other_range], ids=lambda change: change.__name__
)
def test_passing_faults_give_the_right_bytes(
    proxy: tuple[list[Fault], list[str]], local: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    monkeypatch.setattr(shards.storage.ranged, "PAUSE", 0.001)
    wanted = draws()
    tars = open_dataset(ROOT, "one").tars
    faults, log = proxy
    log.clear()
    faults.append(every_third_works(change))
    for number, draw in enumerate(wanted):
        found = read_sample(tars, draw)
        assert isinstance(found, StoredSample)
        assert found.tokens.tobytes() == make_sample("one", number).variants[0].tobytes()
    assert len(log) > 1.5 * len(wanted)  # the faults did happen


def busy_once(proxy: tuple[list[Fault], list[str]], retry_after: str) -> None:
    """The next request is refused for a time."""
    faults, log = proxy
    log.clear()

    def busy(exchange: Exchange) -> None:
        if exchange.number == 1:
            slow_down(exchange)
            exchange.headers = {"Retry-After": retry_after}

    faults.append(busy)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, in place of pauses."""
    pauses = list[float]()
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda pause: pauses.append(pause) if pause else None)
    return pauses


@pytest.mark.parametrize("as_date", [False, True])
def test_a_long_retry_after_is_honoured(
    proxy: tuple[list[Fault], list[str]], local: Path, slept: list[float], as_date: bool
) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    busy_once(proxy, formatdate(time.time() + 100, usegmt=True) if as_date else "100")
    assert isinstance(read_sample(tars, wanted), StoredSample)
    assert len(proxy[1]) == 2
    assert slept == [pytest.approx(100, abs=3)]


def test_a_retry_after_is_waited_for(proxy: tuple[list[Fault], list[str]], local: Path) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    busy_once(proxy, "1")
    since = time.monotonic()
    assert isinstance(read_sample(tars, wanted), StoredSample)
    assert time.monotonic() - since >= 1


@pytest.mark.parametrize("wrong", ["soon", "-5", "Fri, 99 Foo 2026 99:99:99 GMT", formatdate(0, usegmt=True)])
def test_a_retry_after_without_a_time_to_wait(
    proxy: tuple[list[Fault], list[str]], local: Path, slept: list[float], wrong: str
) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    busy_once(proxy, wrong)
    assert isinstance(read_sample(tars, wanted), StoredSample)
    assert len(slept) == 1 and slept[0] < 1


def test_a_retry_after_beyond_the_deadline_ends_the_read_at_once(
    proxy: tuple[list[Fault], list[str]], local: Path, slept: list[float]
) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    busy_once(proxy, "7200")
    with pytest.raises(UnavailableError, match=r"SlowDown \(503\), and asks to wait 7200 s"):
        read_sample(tars, wanted)
    assert not slept and len(proxy[1]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", [slow_down, drip, reset], ids=lambda change: change.__name__)
def test_lasting_faults_end_in_one_named_error(
    proxy: tuple[list[Fault], list[str]], local: Path, change: Callable[..., None]
) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    proxy[0].append(change)
    tars.storage.deadline = 1.0
    since = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"{ROOT}/one/000000.tar: no answer in .* s: .*check the endpoint"):
        read_sample(tars, wanted)
    assert time.monotonic() - since < 5


def test_a_stale_object_is_damage(proxy: tuple[list[Fault], list[str]], local: Path) -> None:
    wanted, tars = draws()[3], open_dataset(ROOT, "one").tars

    def stale(exchange: Exchange) -> None:
        exchange.body = bytes(len(exchange.body))

    proxy[0].append(stale)
    found = read_sample(tars, wanted)
    assert isinstance(found, Damage)
    assert (found.dataset, found.shard, found.row, found.offset) == ("one", "000000", 3, wanted.offset)
    assert "checksum" in found.reason


def test_a_vanished_object_is_damage(proxy: tuple[list[Fault], list[str]], local: Path) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars

    proxy[0].append(answer(404, "NoSuchKey", only=".tar"))
    found = read_sample(tars, wanted)
    assert isinstance(found, Damage)
    assert "NoSuchKey" in found.reason


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (400, "InvalidToken"),
        (403, "AccessDenied"),
        (403, "RequestTimeTooSkewed"),
        (301, "PermanentRedirect"),
        (404, "NoSuchBucket"),  # the whole bucket is gone, so the index is, too
    ],
)
def test_a_store_that_refuses_is_an_error_and_no_damage(
    proxy: tuple[list[Fault], list[str]], local: Path, status: int, code: str
) -> None:
    wanted, tars = draws()[0], open_dataset(ROOT, "one").tars
    proxy[0].append(answer(status, code))
    with pytest.raises(UnavailableError, match=rf"one/000000.tar cannot be read from {ROOT}/one: .*{code}.*masked"):
        read_sample(tars, wanted)


class Role(ThreadingHTTPServer):
    """A token service: the token is the name of the keys that it gives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RoleHandler)


class RoleHandler(BaseHTTPRequestHandler):
    """AssumeRoleWithWebIdentity."""

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert body["Action"] == ["AssumeRoleWithWebIdentity"]
        keys = {pair["accessKey"]: pair["secretKey"] for pair in (KEYS, LATER_KEYS)}
        token = body["WebIdentityToken"][0]
        # The session's token is no part of what SeaweedFS checks for static keys, and stays empty.
        answer = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{token}</AccessKeyId><SecretAccessKey>{keys[token]}</SecretAccessKey>"
            "<SessionToken></SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


Renew = Callable[[dict[str, str]], None]


@pytest.fixture(params=["file", "process", "web identity"])
def renew(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bucket: str
) -> Iterator[Renew]:
    """Gives keys to botocore from a file, a process or a token file, which the function changes as an operator does."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file, config = tmp_path / "given", tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = cat {file}\n" if request.param == "process" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file if request.param == "file" else tmp_path / "none"))
    with contextlib.ExitStack() as stack:
        if request.param == "web identity":
            role = Role()
            threading.Thread(target=role.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            stack.callback(role.server_close)
            stack.callback(role.shutdown)
            monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{role.server_port}")
            monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
            monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))

        def write(keys: dict[str, str]) -> None:
            key, secret = keys["accessKey"], keys["secretKey"]
            text = {
                "file": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n",
                "process": json.dumps({"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret}),
                "web identity": key,
            }
            file.write_text(text[request.param])

        yield write


def test_credentials_that_expire_in_a_run_are_renewed(bucket: str, renew: Renew, local: Path) -> None:
    """The store takes the old key no more; reading goes on with the new one, in several threads at once."""
    with faulty_proxy(bucket) as proxy, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as threads:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_port}")
        renew(KEYS)
        wanted, tars = draws(), open_dataset(ROOT, "one").tars
        assert all(isinstance(found, StoredSample) for found in threads.map(lambda d: read_sample(tars, d), wanted))
        renew(LATER_KEYS)
        proxy.expired.add(KEYS["accessKey"])
        found = list(threads.map(lambda d: read_sample(tars, d), wanted))
        assert all(isinstance(sample, StoredSample) for sample in found)
        assert 1 <= len(proxy.refused) <= 8  # a thread each, at most


@pytest.mark.parametrize("renew", ["file"], indirect=True)
def test_what_is_no_read_renews_credentials_too(bucket: str, renew: Renew, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_bytes(b"3")
    storage = open_storage(f"s3://{BUCKET}/renewed")
    calls: list[tuple[Callable[[], object], object]] = [
        (lambda: storage.write("written", b"1"), None),
        (lambda: storage.create("created", b"22"), True),
        (lambda: storage.publish(made, "published"), None),
        (lambda: storage.size("created"), 2),
        (lambda: storage.list(), ["created", "published", "written"]),
        (lambda: storage.remove("created"), None),
    ]
    with faulty_proxy(bucket) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_port}")
        old, new = KEYS, LATER_KEYS
        for call, wanted in calls:
            proxy.expired.clear()
            renew(old)
            shards.storage.s3._new_client.cache_clear()
            storage.size("written")
            renew(new)
            proxy.expired.add(old["accessKey"])
            before = len(proxy.refused)
            assert call() == wanted
            assert len(proxy.refused) > before


def test_no_credentials_are_a_refusal_with_a_remedy(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This was a traceback of botocore."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    storage = open_storage(f"s3://{BUCKET}/x")
    for call in (storage.read, storage.size):
        with pytest.raises(PermissionError, match=r"Unable to locate credentials.*check AWS_ACCESS_KEY_ID"):
            call("y")


@pytest.mark.slow
def test_no_answer_stops_the_loader(
    proxy: tuple[list[Fault], list[str]], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is not damage: nothing is masked."""
    monkeypatch.setattr(shards.storage.s3, "DEADLINE", 4.0)
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"one": None}}}})
    plan = open_plan([ROOT], mixture, PlanSettings(sequence_length=512, max_crops=64, packs_per_step=2, window=32))
    loader = make_loader(plan, Cursor(), LAYOUT, workers=1)
    next(loader)
    proxy[0].append(slow_down)
    try:
        with pytest.raises(UnavailableError, match="no answer"):
            for _ in range(20):
                next(loader)
    finally:
        loader.close()


@pytest.mark.slow
def test_verify_names_what_is_damaged_in_a_bucket(bucket: str, local: Path) -> None:
    root = f"s3://{BUCKET}/shards"
    assert find_datasets(root) == [f"{ROOT}/one", f"{ROOT}/two"]
    findings = [found for found in verify_dataset(f"{ROOT}/two") if isinstance(found, Finding)]
    storage = open_storage(f"{ROOT}/two")
    tar = storage.read("000001.tar")
    storage.write("000001.tar", tar[:-1500])
    try:
        cut = [found for found in verify_dataset(f"{ROOT}/two") if isinstance(found, Finding)]
    finally:
        storage.write("000001.tar", tar)
    new = [found for found in cut if found not in findings]
    assert new and {found.shard for found in new if found.shard} == {"000001.tar"}


class WholeObject:
    """The answer of a server that knows no ranges: an object of 300 MiB, whose every byte is the number of its MiB."""

    status, headers = 200, {"Content-Length": str(300 * ranged.CHUNK)}

    def __init__(self) -> None:
        self.chunks = iter(range(300))

    def read1(self, size: int) -> bytes:
        return bytes([number % 256]) * size if (number := next(self.chunks, None)) is not None else b""


@pytest.mark.parametrize("place", [0, ranged.CHUNK - 3, 7 * ranged.CHUNK + 5, 299 * ranged.CHUNK])
def test_no_more_than_was_asked_for_is_kept(place: int) -> None:
    """A whole object in place of a sample was held in memory, whatever its size."""
    tracemalloc.start()
    data = ranged.whole_body(WholeObject(), place, 10, time.monotonic() + 60)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data == bytes((place + byte) // ranged.CHUNK % 256 for byte in range(10)) and peak < 4 * ranged.CHUNK


@pytest.mark.slow
def test_make_s3_starts_a_server_whose_data_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a user does it: the printed variables lead to the bucket, and after Ctrl-C and a new start it is as it was."""
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    assert "\ns3: $(DEV)\n\tpython tests/shards/s3_server.py $(MOLMO2_DATA)/s3\n" in makefile
    script = Path(__file__).parents[1] / "s3_server.py"
    for start in range(2):
        with subprocess.Popen([sys.executable, script, tmp_path / "s3"], stdout=subprocess.PIPE, text=True) as shown:
            assert shown.stdout
            try:
                lines = [shown.stdout.readline()]
                while not lines[-1].lstrip().startswith("--set"):
                    assert lines[-1], f"it ended: {lines}"
                    lines.append(shown.stdout.readline())
                for text in lines:
                    if text.startswith("export "):
                        monkeypatch.setenv(*text.removeprefix("export ").strip().split("=", 1))
                shards.storage.s3._new_client.cache_clear()
                shards.storage.s3._presigned.cache_clear()
                storage = open_storage(f"s3://{BUCKET}/shards")
                if start == 0:
                    storage.write("kept", b"data")
                assert storage.read("kept") == b"data"
                assert f"--out {storage.root}\n" in "".join(lines)
            finally:
                shown.send_signal(signal.SIGINT)
        assert shown.returncode == 0
