"""Foreign URLs and foreign archives: what is fetched is right, bounded and public, or it is refused with a reason."""

import io
import os
import socket
import stat
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from web_server import Web, png, web_server

from shards.download.archives import ArchiveError, ArchiveLimits, unpack
from shards.download.connect import FetchError, FetchLimits, public_addresses
from shards.download.fetch import ARCHIVE_LIMITS, USER_AGENT, fetch_bytes, fetch_file, remote_size

LOCAL = FetchLimits(
    allow_private=True, max_seconds=2.0, stall=0.4, attempts=2, first_pause=0.01, longest_pause=3.0, max_bytes=1 << 20
)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as running:
        yield running


def test_a_body_as_it_was_sent(web: Web) -> None:
    assert fetch_bytes(f"{web.url}/image/7", LOCAL) == png(7)
    assert fetch_bytes(f"{web.url}/to//image/8", LOCAL) == png(8)  # a redirect, relative
    assert web.agents == {USER_AGENT}


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("status/404", "http 404", 1),
        ("status/403", "http 403", 1),
        ("status/500", "http 500", 2),
        ("cut", "the connection broke", 2),
        ("big", "larger than 1048576 bytes", 1),
        ("loop", "more than 8 redirects", 1),
        ("later", "http 429", 1),
        ("to/file:///etc/hostname", "scheme 'file' is not followed", 1),
        ("to/http://[", "not a URL", 1),
    ],
)
def test_faults_are_named_and_only_passing_ones_tried_again(web: Web, path: str, reason: str, attempts: int) -> None:
    with pytest.raises(FetchError) as caught:
        fetch_bytes(f"{web.url}/{path}", LOCAL)
    assert (caught.value.reason, caught.value.attempts) == (reason, attempts)
    assert web.asked[f"/{path}"] == (9 if path == "loop" else attempts)


@pytest.mark.parametrize("path", ["drip", "endless"])
def test_slow_bodies_and_slow_headers_end_at_the_deadline(web: Web, path: str) -> None:
    since = time.monotonic()
    with pytest.raises(FetchError, match=r"not fetched within 0\.3 s"):
        fetch_bytes(f"{web.url}/{path}", replace(LOCAL, max_seconds=0.3, attempts=1))
    assert time.monotonic() - since < 2


def test_retry_after_is_honoured(web: Web) -> None:
    since = time.monotonic()
    assert fetch_bytes(f"{web.url}/busy/3", LOCAL) == png(3)
    assert time.monotonic() - since >= 1
    assert web.asked["/busy/3"] == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/",
        "http://localhost:1/",
        "http://2130706433:1/",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1/",
        "http://0.0.0.0:1/",
        "http://224.0.0.1/",
        "http://[::1]:1/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
    ],
)
def test_private_places_are_never_asked(url: str) -> None:
    with pytest.raises(FetchError, match="private address"):
        fetch_bytes(url, FetchLimits())


@pytest.mark.parametrize("url", ["ftp://h/x", "file:///etc/hostname", "data:,x", "http:///x", "http://h:99999/", "x"])
def test_other_schemes_and_broken_urls_are_refused(url: str) -> None:
    with pytest.raises(FetchError, match=r"not followed|not a URL"):
        fetch_bytes(url, FetchLimits())


def test_a_redirect_into_a_private_network_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own server counts as public here; where it redirects to does not."""
    known = public_addresses

    def lenient(host: str, port: int, allow_private: bool) -> list[str]:
        return known(host, port, allow_private or port == web.server_port)

    monkeypatch.setattr("shards.download.connect.public_addresses", lenient)
    limits = replace(LOCAL, allow_private=False)
    assert fetch_bytes(f"{web.url}/image/1", limits) == png(1)
    with pytest.raises(FetchError, match="private address"):
        fetch_bytes(f"{web.url}/to/http://127.0.0.1:9/", limits)


def test_a_name_that_changes_its_address_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the second answer would be this machine. The connection goes to the address that was checked."""
    answers, connected = ["93.184.216.34", "127.0.0.1", "127.0.0.1"], []

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "rebinding.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    def connect(address: tuple[str, int], *_: object) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("socket.create_connection", connect)
    with pytest.raises(FetchError, match="connection refused"):
        fetch_bytes("https://rebinding.example/image", FetchLimits(attempts=1))
    assert connected == [("93.184.216.34", 443)]
    with pytest.raises(FetchError, match="private address"):
        fetch_bytes("https://rebinding.example/image", FetchLimits(attempts=1))


def test_a_file_is_continued_where_it_broke_off(web: Web, tmp_path: Path) -> None:
    web.files["a"] = data = os.urandom(300_000)
    limits = replace(ARCHIVE_LIMITS, allow_private=True, attempts=1)
    web.cuts = [100_000]
    with pytest.raises(FetchError, match="the connection broke"):
        fetch_file(f"{web.url}/file/a", tmp_path / "a", limits)
    assert not (tmp_path / "a").exists()
    fetch_file(f"{web.url}/file/a", tmp_path / "a", limits)
    assert (tmp_path / "a").read_bytes() == data
    assert web.ranges == ["bytes=100000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert remote_size(f"{web.url}/file/a", limits) == 300_000
    assert remote_size(f"{web.url}/status/404", limits) is None


def test_a_file_that_changed_meanwhile_is_fetched_whole(web: Web, tmp_path: Path) -> None:
    web.files["a"] = os.urandom(300_000)
    limits = replace(ARCHIVE_LIMITS, allow_private=True, attempts=1)
    web.cuts = [100_000]
    with pytest.raises(FetchError):
        fetch_file(f"{web.url}/file/a", tmp_path / "a", limits)
    web.files["a"] = changed = os.urandom(200_000)
    fetch_file(f"{web.url}/file/a", tmp_path / "a", limits)
    assert (tmp_path / "a").read_bytes() == changed


# --- archives --------------------------------------------------------------------------------------------------------


def zipped(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return path


def tarred(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member, sort in (("good.txt", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = sort, target
            info.size = 4 if sort == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"text"))
    return path


def test_archives_are_unpacked(tmp_path: Path) -> None:
    members = {"a/b.txt": b"1", "c.txt": b"22"}
    for archive in (zipped(tmp_path / "a.zip", members), tarred(tmp_path / "a.tar.gz", "sub/x.txt")):
        target = tmp_path / archive.name.replace(".", "_")
        for _ in range(2):  # again over what is there: the same tree
            assert unpack(archive, target) == 2
    assert (tmp_path / "a_zip/a/b.txt").read_bytes() == b"1"
    assert (tmp_path / "a_tar_gz/sub/x.txt").read_bytes() == b"text"


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "a\\..\\out.txt"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    for archive in (zipped(tmp_path / "a.zip", {"good.txt": b"", name: b"x"}), tarred(tmp_path / "a.tgz", name)):
        with pytest.raises(ArchiveError, match="leads outside; nothing was unpacked"):
            unpack(archive, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_links_devices_and_bombs_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        with pytest.raises(ArchiveError, match="is no plain file; nothing was unpacked"):
            unpack(tarred(tmp_path / "a.tgz", "x", kind, "/etc/hostname"), tmp_path / "in")
    with pytest.raises(ArchiveError, match="is no plain file"):
        unpack(zipped(tmp_path / "a.zip", {"x": b"/etc/hostname"}, stat.S_IFLNK | 0o777), tmp_path / "in")
    with pytest.raises(ArchiveError, match="unpacks to 30000000 bytes, at most"):
        unpack(zipped(tmp_path / "b.zip", {"x": bytes(30_000_000)}), tmp_path / "in")
    with pytest.raises(ArchiveError, match="2 files, at most 1"):
        unpack(zipped(tmp_path / "c.zip", {"x": b"", "y": b""}), tmp_path / "in", ArchiveLimits(max_files=1))
    assert not (tmp_path / "in").exists()


def test_a_link_that_lay_there_before_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").symlink_to(tmp_path)
    with pytest.raises(ArchiveError, match="through a link"):
        unpack(zipped(tmp_path / "a.zip", {"a/out.txt": b"x"}), tmp_path / "in")
    assert not (tmp_path / "out.txt").exists()


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    whole = tarred(tmp_path / "a.tgz", "x").read_bytes()
    for content in (b"<html>quota exceeded</html>", whole[: len(whole) // 2]):
        (tmp_path / "bad.tgz").write_bytes(content)
        with pytest.raises(ArchiveError, match="not a whole zip or tar archive"):
            unpack(tmp_path / "bad.tgz", tmp_path / "in")
