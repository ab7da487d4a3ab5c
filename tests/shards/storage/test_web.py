"""Published shards on a web server and on the hub: read only, with the checks of a bucket."""

import contextlib
import json
import pickle
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from build_cases import build_part
from fake_hub import Handler as HubHandler
from fake_hub import Hub, client_of, fake_hub
from fork_server import python
from s3_server import (
    Fault,
    Proxy,
    answer,
    cut,
    every_third_works,
    faulty_proxy,
    other_range,
    reset,
    short,
    slow_down,
)
from toy import LAYOUT, make_sample, write_dataset
from web_server import untrusted_certificate

import shards.storage.ranged
import shards.stream.reader
from shards.build.verify import Finding, find_datasets, verify_dataset
from shards.storage import web
from shards.storage.base import UnavailableError
from shards.storage.open import open_storage
from shards.stream.collate import Batch
from shards.stream.dataset import DatasetError, find_dataset, open_dataset
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, PlanSettings, open_plan
from shards.stream.reader import Damage, StoredSample, read_sample

SAMPLES = 24
TOOL = Path(__file__).parents[3] / "tools" / "verify_shards.py"


class Files(ThreadingHTTPServer):
    """A web server for a folder, which answers requests for ranges unless `ranges` is False."""

    daemon_threads = True
    request_queue_size = 256  # with the usual 5 a connection that waits is lost, and the client waits for 30 s

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), FilesHandler)
        self.folder, self.ranges = folder, True
        self.log: list[str] = []  # "PATH RANGE"
        self.tokens: list[str | None] = []  # the Authorization of every request
        self.connections = 0
        self.oldest_ticket = 0  # a request with an older ?ticket= is refused

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class FilesHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Files

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.server.log.append(f"{unquote(parts.path)} {self.headers.get('Range', '')}")
        self.server.tokens.append(self.headers.get("Authorization"))
        path = self.server.folder / unquote(parts.path).lstrip("/")
        if int(parse_qs(parts.query).get("ticket", ["0"])[0]) < self.server.oldest_ticket:
            return self.reply(403, b"<Error><Code>AccessDenied</Code></Error>")
        if parts.path.startswith("/to/"):
            return self.reply(302, b"", {"Location": self.path.removeprefix("/to")})
        if not path.is_file():
            return self.reply(404, b"no such file")
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not self.server.ranges:
            return self.reply(200, data)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.reply(416, b"out of range", {"Content-Range": f"bytes */{len(data)}"})
        return self.reply(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def files_server(folder: Path) -> Iterator[Files]:
    """A server that runs while the block does."""
    server = Files(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two toy datasets in a repository of the hub: ROOT/datasets/owner/name/sft/{one,two}."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("one", "two"):
        write_dataset(root / "datasets/owner/name/sft", name, SAMPLES, per_shard=10)
    return root


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is remembered from another test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards.storage.ranged, "PAUSE", 0.001)
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)
    for cached in (web._followed, web._commit_of, shards.storage.ranged._proxy_of):
        cached.cache_clear()


@pytest.fixture
def files(local: Path) -> Iterator[Files]:
    with files_server(local / "datasets/owner/name") as server:
        yield server


@pytest.fixture
def hub(local: Path, tmp_path: Path) -> Iterator[Hub]:
    with fake_hub(local) as hub, client_of(hub, tmp_path / "home"):
        yield hub


@pytest.fixture(params=["https", "hf"])
def place(request: pytest.FixtureRequest, local: Path, tmp_path: Path) -> Iterator[tuple[str, Proxy]]:
    """The root of the datasets, behind a proxy that misbehaves on request."""
    with contextlib.ExitStack() as stack:
        if request.param == "https":
            upstream = stack.enter_context(files_server(local / "datasets/owner/name"))
            proxy = stack.enter_context(faulty_proxy(upstream.url))
            yield f"http://127.0.0.1:{proxy.server_port}/sft", proxy
        else:
            hub = stack.enter_context(fake_hub(local))
            proxy = stack.enter_context(faulty_proxy(hub.url))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(client_of(hub, tmp_path / "home"))
            patch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{proxy.server_port}")
            yield "hf://datasets/owner/name/sft", proxy


def draws(root: str, name: str = "one") -> list[Draw]:
    """Every sample of a dataset's first shard."""
    fields = ("offset", "span", "xxh64")
    rows = open_dataset(root, name).sidecars[0]
    return [Draw(0, 0, i, 0, *(row[field].item() for field in fields), 0, 0, 0.0) for i, row in enumerate(rows)]


def batches(root: str, workers: int, count: int = 6, **options: int) -> list[Batch]:
    """The first micro-batches of a mixture of both datasets."""
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"one": None, "two": None}}}})
    plan = open_plan([root], mixture, PlanSettings(sequence_length=512, max_crops=64, packs_per_step=2, window=32))
    loader = make_loader(plan, Cursor(), LAYOUT, workers=workers, **options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {}), (0, {"cache": 1 << 30})])
def test_batches_are_those_of_the_disk(
    place: tuple[str, Proxy], local: Path, workers: int, options: dict[str, int]
) -> None:
    wanted = batches(str(local / "datasets/owner/name/sft"), 0)
    for ours, theirs in zip(batches(place[0], workers, **options), wanted, strict=True):
        assert ours.slots == theirs.slots and ours.masked == ()
        for field in ("input_ids", "labels", "loss_weights", "segment_ids", "pixels", "pooling"):
            assert np.array_equal(getattr(ours, field), getattr(theirs, field)), field


def test_sidecars_go_through_the_cache(place: tuple[str, Proxy], local: Path, tmp_path: Path) -> None:
    root, proxy = place
    first = open_dataset(root, "one")
    fetched = [line for line in proxy.log if ".idx.npy bytes=0-" in line and "bytes=0-0" not in line]
    assert len(fetched) == len(list((tmp_path / "cache").rglob("*.npy"))) == 3
    again = open_dataset(root, "one")
    assert [line for line in proxy.log if ".idx.npy bytes=0-" in line and "bytes=0-0" not in line] == fetched
    assert all(np.array_equal(a, b) for a, b in zip(first.sidecars, again.sidecars, strict=True))


def test_a_read_is_one_request(place: tuple[str, Proxy], local: Path) -> None:
    """Where a file is was found before."""
    root, proxy = place
    wanted, tars = draws(root), open_dataset(root, "one").tars
    read_sample(tars, wanted[0])
    proxy.log.clear()
    assert all(isinstance(read_sample(tars, draw), StoredSample) for draw in wanted)
    assert len(proxy.log) == len(wanted)


def test_connections_are_used_again(files: Files) -> None:
    """An answer that was not read to its end went on in the next one."""
    storage = open_storage(f"{files.url}/sft/one")
    for number in range(4):
        assert storage.read("index.json", 1, 4) == (files.folder / "sft/one/index.json").read_bytes()[1:5]
        assert storage.read("index.json", 10**6 + number, 4) == b""  # 416
        assert storage.size("index.json")
    assert files.connections == 1 and len(files.log) == 13


@pytest.mark.slow
@pytest.mark.parametrize("change", [slow_down, reset, cut, short, other_range], ids=lambda change: change.__name__)
def test_passing_faults_give_the_right_bytes(place: tuple[str, Proxy], local: Path, change: Fault) -> None:
    root, proxy = place
    wanted, tars = draws(root), open_dataset(root, "one").tars
    web._followed.cache_clear()
    proxy.log.clear()
    proxy.faults.append(every_third_works(change))
    for number, draw in enumerate(wanted):
        found = read_sample(tars, draw)
        assert isinstance(found, StoredSample)
        assert found.tokens.tobytes() == make_sample("one", number).variants[0].tobytes()
    assert len(proxy.log) > 1.5 * len(wanted)  # the faults did happen


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (slow_down, r"no answer in .*SlowDown"),
        (answer(401, "Unauthorized"), r"refuses: Unauthorized \(401\); check the"),
        (answer(403, "Forbidden"), r"refuses: Forbidden \(403\); check the"),
        (answer(404, "RepoNotFound"), r"refuses: RepoNotFound \(404\); check the"),
    ],
)
def test_an_outage_or_a_refusal_is_no_damage(place: tuple[str, Proxy], local: Path, fault: Fault, message: str) -> None:
    root, proxy = place
    wanted, tars = draws(root)[0], open_dataset(root, "one").tars
    tars.storage.deadline = 0.3  # type: ignore[attr-defined]
    proxy.faults.append(fault)
    with pytest.raises(UnavailableError, match=rf"one/000000.tar cannot be read from {root}/one: .*{message}.*masked"):
        read_sample(tars, wanted)


def test_wrong_bytes_and_a_lost_file_are_damage(place: tuple[str, Proxy], local: Path) -> None:
    root, proxy = place
    wanted, tars = draws(root)[3], open_dataset(root, "one").tars

    def stale(exchange: object) -> None:
        exchange.body = bytes(len(exchange.body))  # type: ignore[attr-defined]

    for fault, reason in ((stale, "checksum"), (answer(404, "EntryNotFound", only=".tar"), "no such object")):
        proxy.faults[:] = [fault]
        found = read_sample(tars, wanted)
        assert isinstance(found, Damage) and (found.shard, found.row) == ("000000", 3) and reason in found.reason


def test_a_sidecar_with_other_bytes_is_refused(place: tuple[str, Proxy], local: Path) -> None:
    def stale(exchange: object) -> None:
        if ".idx.npy" in exchange.path:  # type: ignore[attr-defined]
            exchange.body = bytes(len(exchange.body))  # type: ignore[attr-defined]

    place[1].faults.append(stale)
    with pytest.raises(ValueError, match=r"idx.npy: cannot be used: sha256 .*, index.json says"):
        open_dataset(place[0], "one")


def test_sizes_ranges_and_names(place: tuple[str, Proxy], local: Path) -> None:
    storage, folder = open_storage(f"{place[0]}/one"), local / "datasets/owner/name/sft/one"
    (folder / "a b#c.bin").write_bytes(b"0123456789")
    (folder / "empty").write_bytes(b"")
    try:
        assert storage.size("a b#c.bin") == 10 and storage.size("empty") == 0 and storage.size("missing") is None
        assert storage.read("a b#c.bin") == b"0123456789" and storage.read("empty") == b""
        assert storage.read("a b#c.bin", 3, 4) == b"3456" and storage.read("a b#c.bin", 8, 100) == b"89"
        assert storage.read("a b#c.bin", 100) == b"" and storage.read("a b#c.bin", 3, 0) == b""
        with pytest.raises(FileNotFoundError, match=f"{place[0]}/one/missing"):
            storage.read("missing")
        with pytest.raises(ValueError, match="unsafe file name"):
            storage.read("../two/index.json")
    finally:
        (folder / "a b#c.bin").unlink()
        (folder / "empty").unlink()


def test_a_dataset_that_is_not_there(place: tuple[str, Proxy], local: Path) -> None:
    with pytest.raises(DatasetError, match=f"dataset three is in none of {place[0]}"):
        find_dataset((place[0],), "three")
    with pytest.raises(DatasetError, match=f"{place[0]}/three/index.json does not exist"):
        open_dataset(place[0], "three")


@pytest.mark.parametrize("root", ["https://host/shards", "hf://datasets/owner/name"])
def test_nothing_is_written(root: str, tmp_path: Path) -> None:
    storage, made = open_storage(root), tmp_path / "made"
    made.write_bytes(b"")
    for call in (
        lambda: storage.write("a", b""),
        lambda: storage.create("a", b""),
        lambda: storage.publish(made, "a"),
        lambda: storage.remove("a"),
    ):
        with pytest.raises(OSError, match=f"{root}/a: it cannot be written, .*only read; write to a folder or to s3"):
            call()
    assert made.exists()


def test_a_build_into_it_is_refused(place: tuple[str, Proxy], raw: Path) -> None:
    with pytest.raises(Exception, match=r"cannot be written, since https:// and hf:// are only read"):
        build_part(raw, place[0], "demo-cap")


@pytest.mark.parametrize(
    "url", ["https://", "https://host/x?sig=1", "hf://", "hf://datasets/owner", "hf://spaces/owner/name"]
)
def test_urls_that_name_no_folder(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(url)):
        open_storage(url)


def test_a_server_without_ranges_is_refused(files: Files) -> None:
    """Each sample would be a transfer of its whole shard."""
    files.ranges = False
    tars = open_dataset(f"{files.url}/sft", "one").tars  # index and sidecars are read whole
    with pytest.raises(UnavailableError, match=r"the server sends only whole files; read from a server that answers"):
        read_sample(tars, draws(f"{files.url}/sft")[0])


def test_the_proxy_of_the_environment_is_used(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a cluster often reach other hosts in this way alone."""
    wanted = (files.folder / "sft/one/index.json").read_bytes()
    monkeypatch.setenv("http_proxy", files.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert open_storage("http://shards.invalid/sft/one").read("index.json") == wanted
    with files_server(files.folder) as near:
        assert open_storage(f"{near.url}/sft/one").read("index.json") == wanted
        assert len(near.log) == len(files.log) == 2


def test_redirects_are_followed(files: Files) -> None:
    root = f"{files.url}/to/sft"
    assert isinstance(read_sample(open_dataset(root, "one").tars, draws(root)[0]), StoredSample)
    assert open_storage(f"{root}/one").size("index.json") == (files.folder / "sft/one/index.json").stat().st_size


@pytest.mark.slow
def test_verification(files: Files, hub: Hub) -> None:
    """A web server lists nothing, so it is given a dataset's own folder."""
    root = "hf://datasets/owner/name/sft"
    assert find_datasets(root) == [f"{root}/one", f"{root}/two"]
    assert find_datasets(f"{files.url}/sft/one/") == [f"{files.url}/sft/one"]
    with pytest.raises(OSError, match="a web server does not list its files; name one dataset's folder"):
        find_datasets(f"{files.url}/sft")
    wanted = list(verify_dataset(str(files.folder / "sft/one")))
    for place in (f"{files.url}/sft/one", f"{root}/one"):
        assert list(verify_dataset(place)) == wanted
    tar = files.folder / "sft/one/000001.tar"
    data = tar.read_bytes()
    try:
        tar.write_bytes(data[:-1500])
        web._commit_of.cache_clear()
        for place in (f"{files.url}/sft/one", f"{root}/one"):
            new = [found for found in verify_dataset(place) if isinstance(found, Finding) and found not in wanted]
            assert new and {found.shard for found in new if found.shard} == {"000001.tar"}
    finally:
        tar.write_bytes(data)


@pytest.mark.slow
def test_repair_is_refused_before_anything_is_changed(files: Files, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, "near", 4)
    before = (folder / "index.json").read_bytes()
    far = f"{files.url}/sft/one"
    done = subprocess.run([python(), TOOL, "--reindex", folder, far], capture_output=True, text=True)
    assert done.returncode == 1 and f"{far}: it cannot be written; copy it" in done.stderr
    assert (folder / "index.json").read_bytes() == before


class Redirecting(HubHandler):
    """Files lie on another host, behind URLs that are valid for a time."""

    cdn: Files
    ticket = 0

    def resolve(self, owner: str, name: str, revision: str, file: str, kind: str = "") -> None:
        self.server.folder(kind or "models", f"{owner}/{name}", revision)
        self.check_access(f"{owner}/{name}")
        to = f"{self.cdn.url}/{kind or 'models'}/{owner}/{name}/{file}?ticket={Redirecting.ticket}"
        self.send(302, b"", {"Location": to, "X-Linked-Size": "1"})


@pytest.fixture
def cdn(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Files]]:
    with files_server(local) as cdn, fake_hub(local, Redirecting) as hub, client_of(hub, tmp_path / "home", "secret"):
        monkeypatch.setattr(Redirecting, "cdn", cdn, raising=False)
        monkeypatch.setattr(Redirecting, "ticket", 0)
        yield hub, cdn


def test_the_token_goes_to_the_hub_alone(cdn: tuple[Hub, Files]) -> None:
    hub, far = cdn
    hub.gated, hub.tokens = {"owner/name"}, {"secret"}
    root = "hf://datasets/owner/name/sft"
    assert isinstance(read_sample(open_dataset(root, "one").tars, draws(root)[0]), StoredSample)
    assert far.log and set(far.tokens) == {None}


@pytest.mark.slow
def test_an_expired_redirect_is_followed_anew(cdn: tuple[Hub, Files]) -> None:
    hub, far = cdn
    root = "hf://datasets/owner/name/sft"
    wanted, tars = draws(root), open_dataset(root, "one").tars
    assert all(isinstance(read_sample(tars, draw), StoredSample) for draw in wanted)
    asked = len(hub.log)
    assert all(isinstance(read_sample(tars, draw), StoredSample) for draw in wanted)
    assert len(hub.log) == asked
    Redirecting.ticket = far.oldest_ticket = 1
    assert all(isinstance(read_sample(tars, draw), StoredSample) for draw in wanted)
    assert len(hub.log) == asked + 1


def test_a_gated_repository_is_refused_with_the_remedy(hub: Hub) -> None:
    hub.gated = {"owner/name"}
    with pytest.raises(PermissionError, match=r"GatedRepo \(401\).*ask for access on its page and log in"):
        open_dataset("hf://datasets/owner/name/sft", "one")


@pytest.mark.parametrize("wrong", ["owner/nothing", "owner/name@v9"])
def test_a_repository_or_revision_that_is_not_there(hub: Hub, wrong: str) -> None:
    with pytest.raises(PermissionError, match=r"(Repo|Revision)NotFound.*check the name, hf://datasets/OWNER/NAME"):
        find_dataset((f"hf://datasets/{wrong}/sft",), "one")


def test_one_commit_is_read_and_goes_to_workers(hub: Hub, local: Path) -> None:
    """A later upload to the branch is no damage of what a run reads."""
    storage = open_storage("hf://datasets/owner/name/sft/one")
    storage.read("index.json")
    commit = storage.commit()  # type: ignore[attr-defined]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    hub.log.clear()
    copy = pickle.loads(pickle.dumps(storage))
    web._commit_of.cache_clear()
    copy.read("000000.tar", 0, 10)
    assert hub.log and all(f"/resolve/{commit}/" in line for line in hub.log)


class Paged(HubHandler):
    """The hub lists a large folder in pages."""

    def send_json(self, value: object, status: int = 200) -> None:
        if isinstance(value, list):
            first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
            url = f"{self.server.url}{urlsplit(self.path).path}?recursive=true&cursor={first + 2}"
            more = {"Link": f'<{url}>; rel="next"'} if first + 2 < len(value) else {}
            self.send(status, json.dumps(value[first : first + 2]).encode(), more)
        else:
            super().send_json(value, status)


def test_long_listings_have_pages(local: Path, tmp_path: Path) -> None:
    with fake_hub(local, Paged) as hub, client_of(hub, tmp_path / "home"):
        storage = open_storage("hf://datasets/owner/name/sft/one")
        assert storage.list(".tar") == ["000000.tar", "000001.tar", "000002.tar"]
        assert open_storage("hf://datasets/owner/name").list("one/000001.tar") == ["sft/one/000001.tar"]
        assert open_storage("hf://datasets/owner/name/none").list() == []
        assert len([line for line in hub.log if "/tree/" in line]) > 6


def test_another_revision(hub: Hub, local: Path) -> None:
    other = local / "datasets/owner/name@v2/sft/one"
    other.mkdir(parents=True)
    (other / "a").write_bytes(b"two")
    assert open_storage("hf://datasets/owner/name@v2/sft/one").read("a") == b"two"
    assert open_storage("hf://datasets/owner/name/sft/one").size("a") is None


def test_the_hub_is_not_asked_when_that_is_forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError, match=r"hf://datasets/owner/name/sft/one: HF_HUB_OFFLINE is set"):
        find_dataset(("hf://datasets/owner/name/sft",), "one")
    assert not hub.log


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "DEADLINE", 0.2)
    with files_server(tmp_path) as gone:
        url = f"{gone.url}/shards"
    with pytest.raises(UnavailableError, match=rf"{url}/one/index.json: no answer in .*Connection refused.*check the"):
        find_dataset((url,), "one")


def test_a_host_that_does_not_exist_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that is busy is asked again; one that knows no such name is not."""
    asked = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise socket.gaierror(socket.EAI_NONAME if len(asked) > 2 else socket.EAI_AGAIN, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(UnavailableError, match=r"there is no host nowhere\.example:81 \(Name or service not known\)"):
        open_storage("http://nowhere.example:81/shards").read("one/index.json")
    assert len(asked) == 3


def test_a_certificate_that_is_not_trusted_is_told_at_once(files: Files, tmp_path: Path) -> None:
    files.socket = untrusted_certificate(tmp_path).wrap_socket(files.socket, server_side=True)
    files.handle_error = lambda *_: None  # type: ignore[method-assign]
    since = time.monotonic()
    with pytest.raises(UnavailableError, match=r"the certificate of 127\.0\.0\.1:\d+ is not trusted \(self.signed"):
        open_storage(files.url.replace("http:", "https:")).read("one/index.json")
    assert time.monotonic() - since < shards.storage.ranged.DEADLINE / 4
