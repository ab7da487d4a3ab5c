"""Shards that somebody made to do harm: each is one finding or one masked sample, and nothing hangs or ends a run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from toy import write_dataset

from shards.build.repair import repair_dataset
from shards.build.verify import Finding, verify_dataset
from shards.format import BLOCK, FormatError, parse_index, tar_members, whole_headers
from shards.stream.dataset import open_dataset
from shards.stream.plan import Draw
from shards.stream.reader import Damage, read_sample

NEGATIVE = {"octal": b"-0000001000\0", "binary": b"\xff" * 10 + b"\xfe\x00", "spaced": b" -1000      "}


def header(name: str, size: bytes) -> bytes:
    """A tar header with these bytes as its size, and a valid checksum."""
    data = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    data[124:136] = size.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


def findings(folder: Path) -> list[Finding]:
    return [found for found in verify_dataset(str(folder)) if isinstance(found, Finding)]


def draws(root: Path, name: str) -> list[Draw]:
    rows = open_dataset(str(root), name).sidecars[0]
    return [
        Draw(0, 0, i, 0, *(row[f].item() for f in ("offset", "span", "xxh64")), 0, 0, 0.0) for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("size", NEGATIVE.values(), ids=NEGATIVE)
@pytest.mark.timeout(10)
def test_a_negative_size_is_no_header(size: bytes) -> None:
    data = header("a.json", size) + bytes(BLOCK)
    with pytest.raises(FormatError, match=r"size in the tar header of 'a\.json'"):
        tar_members(data)
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("b.json"))
    assert [key for _, _, key in whole_headers(data + good.getvalue())] == ["b"]


@pytest.mark.parametrize("size", NEGATIVE.values(), ids=NEGATIVE)
@pytest.mark.timeout(20)
def test_a_member_of_negative_size_is_one_damage(tmp_path: Path, size: bytes) -> None:
    folder = write_dataset(tmp_path, "toy", 5)
    tar = folder / "000000.tar"
    data = bytearray(tar.read_bytes())
    place = draws(tmp_path, "toy")[1].offset
    data[place : place + BLOCK] = header("toy-00001.json", size)
    tar.write_bytes(data)
    dataset = open_dataset(str(tmp_path), "toy")
    damaged = [isinstance(read_sample(dataset.tars, draw), Damage) for draw in draws(tmp_path, "toy")]
    assert damaged == [False, True, False, False, False]
    assert [found.key for found in findings(folder) if "checksum" in found.problem] == ["toy-00001"]
    (done,) = repair_dataset(folder)
    assert (done.kept, len(done.dropped)) == (4, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", "../../../../somewhere/file"),
        ("sha256", "0" * 64 + "\n"),
        ("sha256", "A" * 64),
        ("index_sha256", "/etc/passwd"),
        ("samples", -1),
        ("bytes", -(10**9)),
        ("max_tokens", -1),
        ("max_crops", -1),
        ("name", "\N{ARABIC-INDIC DIGIT ONE}" * 6),
    ],
)
def test_an_index_names_no_other_files_and_has_no_negative_counts(tmp_path: Path, field: str, value: object) -> None:
    path = write_dataset(tmp_path, "toy", 3) / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0][field] = value
    with pytest.raises(FormatError, match=field):
        parse_index(json.dumps(index).encode(), str(path))


def test_an_index_has_no_negative_totals(tmp_path: Path) -> None:
    index = json.loads((write_dataset(tmp_path, "toy", 3) / "index.json").read_text())
    for field in index["totals"]:
        with pytest.raises(FormatError, match=field):
            parse_index(json.dumps({**index, "totals": {**index["totals"], field: -1}}).encode(), "index.json")
