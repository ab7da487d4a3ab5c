"""Archives, listings and images that mean harm: nothing is written elsewhere, and one never stops the rest."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from shards.download.archives import ArchiveError, unpack
from shards.download.connect import FetchError, FetchLimits, connect
from shards.download.manifest import File, stored_manifest
from shards.sources.paths import own_file


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"evil")
    return path


def tarred(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


OWN = [
    *(
        ".download/listing.json",
        ".download/extracted/a.zip.json",
        ".Download/lock",
        "./.download/x",
        "a/../.download/x",
    ),
    *("manifest.json", "MANIFEST.json", "failures.jsonl", ".cache/huggingface/download/x.metadata", ".unpacking"),
    f"media/ab/{'ab' * 32}",
]


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", OWN)
def test_no_archive_replaces_the_state_of_the_downloader(tmp_path: Path, pack: Callable[..., Path], name: str) -> None:
    raw = tmp_path / "raw"
    (raw / ".download").mkdir(parents=True)
    with pytest.raises(ArchiveError, match=r"nothing was unpacked"):
        unpack(pack(tmp_path / "a", "good.txt", name), raw)
    assert [path.name for path in raw.rglob("*")] == [".download"]


def test_a_folder_inside_may_have_these_names(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    assert unpack(zipped(tmp_path / "a", "manifest.json", "media/1.jpg"), raw / "coco", raw=raw) == 2
    with pytest.raises(ArchiveError, match="downloader"):
        unpack(zipped(tmp_path / "b", "listing.json"), raw / ".download", raw=raw)


def test_a_json_file_in_place_of_an_archive_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ArchiveError, match="downloader"):
        unpack(tmp_path / "manifest.json", tmp_path / "raw")


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a/../../x", "", ".download/listing.json", "a\0b", "..\\x"])
def test_a_listing_names_files_of_its_folder_alone(tmp_path: Path, path: str) -> None:
    with pytest.raises(pydantic.ValidationError, match="path"):
        File(path=path, bytes=1)
    download = {"kind": "hub", "repo": "a/b", "include": ["*"]}
    listing = {"repo": "a/b", "commit": "1", "files": [{"path": path, "bytes": 1}]}
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "x", "download": download, "listing": listing}))
    assert stored_manifest(tmp_path) is None


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    raw, victim = tmp_path / "raw", tmp_path / "victim"
    raw.mkdir()
    victim.write_text("mine")
    (raw / ".unpacking").symlink_to(victim)
    assert unpack(zipped(tmp_path / "a.zip", "x.txt"), raw) == 1
    assert victim.read_text() == "mine" and (raw / "x.txt").read_text() == "evil" and not (raw / "x.txt").is_symlink()


# --- archives that end a program --------------------------------------------------------------------------------------


def with_size(kind: bytes, size: bytes, pax: bytes = b"") -> bytes:
    """A tar whose first header has this type and these bytes as its size."""
    info = tarfile.TarInfo("x")
    data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    data[156:157] = kind
    data[124:136] = size.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    body = pax.ljust(-(-len(pax) // 512) * 512, b"\0")
    return bytes(data) + body + tarfile.TarInfo("y").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


def octal(number: int) -> bytes:
    return f"{number:011o}".encode()


PAX = b"17 size=-1000000\n"
TARS = {
    "negative": with_size(b"0", b"-0000001000"),
    "negative in base 256": with_size(b"0", b"\xff" * 10 + b"\xfe\x00"),
    "negative extended header": with_size(b"x", b"\xff" * 10 + b"\xfe\x00"),
    "negative size in an extended header": with_size(b"x", octal(len(PAX)), PAX),
    "negative long name": with_size(b"L", b"-0000001000"),
    "extended header of 3 GB": with_size(b"x", octal(3 << 30)),
    "long name of 3 GB": with_size(b"L", octal(3 << 30)),
    "global header of 3 GB": with_size(b"g", octal(3 << 30)),
    "sparse": with_size(b"S", octal(1 << 20)),
}


@pytest.mark.parametrize("data", TARS.values(), ids=TARS)
@pytest.mark.parametrize("packed", [bytes, lzma.compress], ids=["plain", "xz"])
@pytest.mark.timeout(20)
def test_a_tar_with_an_impossible_size_is_refused(
    tmp_path: Path, data: bytes, packed: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.tar").write_bytes(packed(data))
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "a.tar", tmp_path / "raw")
    assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("x" * 300,), ("x/" * 3000 + "y",)], ids=range(4))
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_names_that_no_disk_takes_are_an_archive_error(
    tmp_path: Path, pack: Callable[..., Path], names: tuple[str, ...]
) -> None:
    with pytest.raises(ArchiveError):
        unpack(pack(tmp_path / "a", *names), tmp_path / "raw")


def test_own_files_are_known_by_any_spelling() -> None:
    assert all(own_file(Path(name)) for name in OWN if ".." not in name)
    assert not any(map(own_file, map(Path, ("a.json", "x/manifest.json", "media/a.jpg", "data/.download/x"))))


@pytest.mark.parametrize("address", ["fec0::1", "feff::1", "fe80::1", "fd00::1", "::1", "::ffff:10.0.0.1", "ff02::1"])
def test_private_addresses_are_not_asked(address: str) -> None:
    with pytest.raises(FetchError, match="private address"):
        connect(f"http://[{address}]/", FetchLimits(), time.monotonic() + 5)
