"""Every byte of a small shard flipped, and every cut: found and named by reader and verify, nothing else is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy import make_sample, write_samples

import shards.stream.reader
from shards.build.verify import Finding, verify_dataset
from shards.format import BLOCK, FormatError
from shards.media.jpeg import decode_jpeg, encode_jpeg
from shards.stream.dataset import Dataset, open_dataset
from shards.stream.plan import Draw
from shards.stream.reader import Damage, StoredSample, read_sample

KEYS = ["toy-00001", "toy-00000"]  # an image of two JPEG members, text


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)


def made(root: Path, keys: list[str]) -> Dataset:
    """A dataset of one shard; its images are of one colour, hence small."""
    samples = [make_sample("toy", int(key[-5:])) for key in keys]
    plain = [encode_jpeg(np.zeros_like(decode_jpeg(image))) for image in samples[0].images]
    folder = write_samples(root, "toy", [replace(samples[0], images=tuple(plain)), *samples[1:]])
    index = json.loads((folder / "index.json").read_text())
    for finding in findings(folder):  # the toy's totals are zeros: make them true
        count, name = finding.problem.split(",")[0].split()
        index["totals"][name] = int(count)
    (folder / "index.json").write_text(json.dumps(index))
    assert findings(folder) == []
    return open_dataset(str(root), "toy")


def findings(folder: Path) -> list[Finding]:
    return [finding for finding in verify_dataset(str(folder)) if isinstance(finding, Finding)]


def draws(dataset: Dataset) -> list[Draw]:
    fields = ("offset", "span", "xxh64")
    return [Draw(0, 0, i, 0, *(row[f].item() for f in fields), 0, 0, 0.0) for i, row in enumerate(dataset.sidecars[0])]


@contextmanager
def flips(path: Path) -> Iterator[Iterator[int]]:
    """Positions; at each, the file has one wrong byte, and none afterwards."""
    good = path.read_bytes()

    def each(file: int) -> Iterator[int]:
        for position, byte in enumerate(good):
            os.pwrite(file, bytes([byte ^ (1 << position % 8)]), position)
            yield position
            os.pwrite(file, bytes([byte]), position)

    file = os.open(path, os.O_RDWR)
    try:
        yield each(file)
    finally:
        os.close(file)
    assert path.read_bytes() == good


@pytest.mark.slow
def test_the_reader_names_every_flipped_byte(tmp_path: Path) -> None:
    dataset = made(tmp_path, KEYS)
    every, seen = draws(dataset), 0
    ends = [draw.offset + draw.span for draw in every]
    with flips(Path(dataset.storage.root, "000000.tar")) as positions:
        for position in positions:
            hit = sum(position >= end for end in ends)
            for number, draw in enumerate(every):
                found = read_sample(dataset.tars, draw)
                if number != hit:
                    assert isinstance(found, StoredSample) and found.key == KEYS[number]
                    continue
                assert isinstance(found, Damage)
                assert (found.dataset, found.shard, found.row) == ("toy", "000000", number)
                assert (found.key, found.offset) == (KEYS[number], draw.offset)
                assert "checksum" in found.reason
                seen += 1
    assert seen == ends[-1]


@pytest.mark.slow
def test_verify_names_every_flipped_byte(tmp_path: Path) -> None:
    """Padding behind the last sample included."""
    dataset = made(tmp_path, KEYS[:1])
    every, folder = draws(dataset), Path(dataset.storage.root)
    ends = [draw.offset + draw.span for draw in every]
    with flips(folder / "000000.tar") as positions:
        for position in positions:
            whole, *named = [finding for finding in findings(folder) if finding.shard]
            assert "other sha256" in whole.problem
            assert {(finding.dataset, finding.shard) for finding in named} == {("toy", "000000.tar")}
            if position >= ends[-1]:
                assert [(finding.offset, finding.problem) for finding in named] == [
                    (ends[-1], "bytes after the last sample")
                ]
            else:
                hit = sum(position >= end for end in ends)
                assert [(finding.key, finding.offset) for finding in named] == [(KEYS[hit], every[hit].offset)]


def test_every_flipped_byte_of_a_sidecar_is_found(tmp_path: Path) -> None:
    dataset = made(tmp_path, KEYS)
    folder, seen = Path(dataset.storage.root), 0
    with flips(folder / "000000.idx.npy") as positions:
        for _ in positions:
            seen += 1
            assert "the sidecar has another sha256" in " ".join(finding.problem for finding in findings(folder))
            with pytest.raises(FormatError, match=r"toy/000000.idx.npy: cannot be used: sha256"):
                open_dataset(str(folder.parent), "toy")
    assert seen == (folder / "000000.idx.npy").stat().st_size


def test_every_truncation_is_found_and_named(tmp_path: Path) -> None:
    dataset = made(tmp_path, KEYS)
    folder, every = Path(dataset.storage.root), draws(dataset)
    tar = folder / "000000.tar"
    good = tar.read_bytes()
    for size in range(0, len(good), BLOCK):
        tar.write_bytes(good[:size])
        found = findings(folder)
        assert "other sha256" in found[0].problem and found[0].shard == "000000.tar"
        cut = [number for number, draw in enumerate(every) if draw.offset + draw.span > size]
        named = [finding for finding in found if finding.offset >= 0]
        assert [finding.offset for finding in named] == [every[number].offset for number in cut]
        for number, finding in zip(cut, named, strict=True):
            # A sample of which no header is left has no key that could be told.
            assert finding.key == (KEYS[number] if size >= every[number].offset + BLOCK else "")
            assert "cut short" in finding.problem
        for number, draw in enumerate(every):
            sample = read_sample(dataset.tars, draw)
            if number in cut:
                assert isinstance(sample, Damage)
                assert (sample.dataset, sample.shard, sample.row, sample.offset) == (
                    "toy",
                    "000000",
                    number,
                    draw.offset,
                )
                assert f"expected {draw.span}: the file is cut short" in sample.reason
            else:
                assert isinstance(sample, StoredSample)
    tar.unlink()
    assert all("No such file" in str(read_sample(dataset.tars, draw)) for draw in every)
