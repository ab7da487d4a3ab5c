"""The whole loader, with two workers, on a real S3 server behind a proxy that misbehaves in every way at once."""

import contextlib
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from s3_server import (
    BUCKET,
    KEYS,
    Exchange,
    Fault,
    Proxy,
    answer,
    cut,
    drip,
    endless,
    faulty_proxy,
    other_range,
    point_at,
    reset,
    short,
    slow_down,
)
from toy import LAYOUT
from web_server import untrusted_certificate

import shards.storage.ranged
import shards.stream.reader
from shards.storage.base import UnavailableError, take_tally
from shards.stream.collate import Batch
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Plan, PlanSettings, open_plan

ROOT = f"s3://{BUCKET}/shards/sft"
MIXTURE = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"one": None, "two": None}}}})
SETTINGS = PlanSettings(sequence_length=512, max_crops=64, packs_per_step=2, window=32)
BATCHES = 10  # about an epoch of both datasets
REMEDY = "check AWS_ACCESS_KEY_ID"


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards.storage.ranged, "PAUSE", 0.001)
    monkeypatch.setattr(shards.storage.ranged, "ATTEMPT", 2.0)
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)
    with faulty_proxy(server) as proxy:
        point_at(f"http://127.0.0.1:{proxy.server_port}", monkeypatch)
        yield proxy


def open_mixture(root: str) -> Plan:
    return open_plan([root], MIXTURE, SETTINGS)


def batches(plan: Plan, workers: int = 2) -> list[Batch]:
    """The first batches, copied out of the memory that workers share."""
    loader = make_loader(plan, Cursor(), LAYOUT, workers=workers, damage_budget=None)
    try:
        return [next(loader)._map_tensors(torch.clone) for _ in range(BATCHES)]
    finally:
        loader.close()


@pytest.fixture(scope="module")
def wanted(local: Path) -> list[Batch]:
    """The same batches from the disk."""
    return batches(open_mixture(str(local)), workers=0)


def internal_error(exchange: Exchange) -> None:
    answer(500, "InternalError")(exchange)


def come_back(exchange: Exchange) -> None:
    """Busy, and the client is asked to wait for a second."""
    slow_down(exchange)
    exchange.headers = {"Retry-After": "1"}


def flip(exchange: Exchange) -> None:
    """One wrong bit in the middle."""
    body = bytearray(exchange.body)
    body[len(body) // 2] ^= 1
    exchange.body = bytes(body)


FAULTS: dict[Fault, float] = {  # and how often each is drawn
    **dict.fromkeys((slow_down, internal_error, reset, cut, short, other_range, flip), 4.0),
    **dict.fromkeys((endless, drip, come_back), 1.0),
}


class RandomFaults:
    """A fault that draws one of `FAULTS`, or none, for the first two answers to each range; later answers are right.

    What is drawn depends on the seed, the range and how often it was asked for, not on the order of threads.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.asked, self.seen = seed, Counter[str](), Counter[str]()
        self.lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        place = f"{exchange.path.split('?')[0]} {exchange.headers.get('Content-Range')}"
        with self.lock:
            self.asked[place] += 1
            rng = random.Random(f"{self.seed} {place} {self.asked[place]}")
            if self.asked[place] > 2 or rng.random() < 0.3:
                return
            (fault,) = rng.choices(list(FAULTS), list(FAULTS.values()))
            self.seen[fault.__name__] += 1
        fault(exchange)


@pytest.mark.slow
def test_all_passing_faults_together_change_no_batch(proxy: Proxy, wanted: list[Batch]) -> None:
    plan = open_mixture(ROOT)
    proxy.faults.append(faults := RandomFaults(seed=1))
    take_tally()  # workers inherit what other tests have counted
    found = batches(plan)
    assert set(faults.seen) == {fault.__name__ for fault in FAULTS}
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.slots, ours.divisor, ours.cursor, ours.masked) == (
            *(theirs.slots, theirs.divisor, theirs.cursor, ()),
        )
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name
    retries = sum(batch.reads.counts.get("retries", 0) for batch in found)
    assert retries > faults.seen.total() / 2  # not in it are retries for batches that nobody took


@pytest.mark.slow
def test_a_byte_that_stays_wrong_masks_its_sample_alone(proxy: Proxy, wanted: list[Batch]) -> None:
    plan = open_mixture(ROOT)
    row = plan.datasets[0].sidecars[1][3]
    place = int(row["offset"]) + 700

    def stays_wrong(exchange: Exchange) -> None:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/\d+", exchange.headers.get("Content-Range", ""))
        if "/one/000001.tar" in exchange.path and match and int(match[1]) <= place <= int(match[2]):
            body = bytearray(exchange.body)
            body[place - int(match[1])] ^= 1
            exchange.body = bytes(body)

    proxy.faults.append(stays_wrong)
    masked = 0
    for ours, theirs in zip(batches(plan), wanted, strict=True):
        damages = {(each.dataset, each.shard, each.row, each.offset) for each in ours.masked}
        assert damages <= {("one", "000001", 3, int(row["offset"]))}
        assert all("checksum" in each.reason for each in ours.masked)
        same = ours.segment_ids == theirs.segment_ids
        assert torch.equal(ours.input_ids[same], theirs.input_ids[same]) and same.all() == (not damages)
        assert (ours.loss_weights[~same] == 0).all()
        masked += len(ours.masked)
    assert masked


def refused(proxy: Proxy, _: pytest.MonkeyPatch, __: Path) -> None:
    proxy.faults.append(answer(403, "AccessDenied"))


def expired(proxy: Proxy, _: pytest.MonkeyPatch, __: Path) -> None:
    proxy.expired.add(KEYS["accessKey"])


def no_such_host(_: Proxy, monkeypatch: pytest.MonkeyPatch, __: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    point_at("http://nowhere.example:81", monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@contextlib.contextmanager
def untrusted(_: Proxy, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """A server with a certificate that it made itself."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = untrusted_certificate(folder).wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        point_at(f"https://127.0.0.1:{server.server_port}", monkeypatch)
        yield
        server.shutdown()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (refused, rf"AccessDenied \(403\); {REMEDY}"),
        (expired, rf"ExpiredToken \(400\); {REMEDY}"),
        (no_such_host, r"there is no host nowhere\.example:81 .*check the address of the endpoint"),
        (untrusted, r"the certificate of 127\.0\.0\.1:\d+ is not trusted .*SSL_CERT_FILE"),
    ],
)
def test_a_refusal_is_one_error_with_its_remedy(
    proxy: Proxy,
    local: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refuse: Callable[..., contextlib.AbstractContextManager[None] | None],
    message: str,
) -> None:
    """The first refused read ends the loader; batches before it are whole."""
    plan = open_mixture(ROOT)
    with refuse(proxy, monkeypatch, tmp_path) or contextlib.nullcontext():
        loader = make_loader(plan, Cursor(), LAYOUT, workers=1, read_ahead=0)
        try:
            with pytest.raises(UnavailableError, match=rf"cannot be read from {ROOT}/\w+: .*{message}") as caught:
                next(loader)
        finally:
            loader.close()
    assert "no sample was masked" in str(caught.value) and "Traceback" not in str(caught.value)
