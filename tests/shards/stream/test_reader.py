"""Reading one sample: as written, read again after a passing fault, and named when it is damaged."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy import make_sample, write_dataset

import shards.stream.reader
from shards.format import INDEX_NAME, FormatError
from shards.storage.base import UnavailableError
from shards.storage.local import LocalStorage
from shards.stream.dataset import Dataset, open_dataset
from shards.stream.plan import Draw
from shards.stream.reader import Damage, ReadError, StoredSample, parse_sample, read_sample


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_dataset(tmp_path, "toy", 5)
    return open_dataset(str(tmp_path), "toy")


def draws(dataset: Dataset, variant: int = 0) -> list[Draw]:
    """Every sample of the first shard."""
    return [
        Draw(0, 0, i, variant, *(row[f].item() for f in ("offset", "span", "xxh64")), 0, row["num_crops"][variant], 0.0)
        for i, row in enumerate(dataset.sidecars[0])
    ]


def read_all(dataset: Dataset) -> list[StoredSample | Damage]:
    return [read_sample(dataset.tars, draw) for draw in draws(dataset)]


@pytest.mark.parametrize("variant", [0, 1])
def test_reads_what_was_written(dataset: Dataset, variant: int) -> None:
    for number, draw in enumerate(draws(dataset, variant)):
        found, wanted = read_sample(dataset.tars, draw), make_sample("toy", number)
        assert isinstance(found, StoredSample)
        assert found.key == wanted.key
        assert found.tokens.tobytes() == wanted.variants[variant].tobytes()
        assert found.visuals == wanted.record["visuals"]
        assert [found.images[i] for i in range(len(found.images))] == list(wanted.images)


def test_one_range_per_sample(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []
    read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, *where: ranges.append(where) or read(self, *where))
    read_all(dataset)
    assert ranges == [("000000.tar", draw.offset, draw.span) for draw in draws(dataset)]


def test_the_key_is_told_where_it_can_be_read(dataset: Dataset) -> None:
    tar = Path(dataset.storage.root, "000000.tar")
    good = bytearray(tar.read_bytes())
    good[draws(dataset)[1].offset + 600] ^= 1
    good[draws(dataset)[2].offset] ^= 0x01  # another letter of the key: the header's own checksum tells
    good[draws(dataset)[3].offset :] = bytes(len(good) - draws(dataset)[3].offset)
    tar.write_bytes(good)
    found = read_all(dataset)
    assert str(found[1]).startswith("toy/000000.tar, sample 1 (toy-00001) at byte ")
    assert "sample 2 (toy-00002)" in str(found[2])
    assert "sample 3 (None)" in str(found[3])


def failing(times: int, fail: Callable[[bytes], bytes]) -> Callable[..., bytes]:
    read, calls = LocalStorage.read, []

    def flaky(self: LocalStorage, *where: object) -> bytes:
        calls.append(where)
        data = read(self, *where)  # type: ignore[arg-type]
        return fail(data) if len(calls) <= times else data

    return flaky


def fail_with_error(data: bytes) -> bytes:
    raise OSError("connection reset")


@pytest.mark.parametrize("fail", [lambda data: data[:-1], lambda data: data[:-1] + b"!", fail_with_error])
def test_a_passing_fault_is_read_again(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, fail: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(LocalStorage, "read", failing(2, fail))
    assert isinstance(read_sample(dataset.tars, draws(dataset)[0]), StoredSample)
    monkeypatch.undo()
    monkeypatch.setattr(LocalStorage, "read", failing(3, fail))
    if fail is fail_with_error:  # the store's fault, so that the sample may be intact
        with pytest.raises(UnavailableError, match=r"toy/000000\.tar cannot be read from .*connection reset"):
            read_sample(dataset.tars, draws(dataset)[0])
        return
    found = read_sample(dataset.tars, draws(dataset)[0])
    assert isinstance(found, Damage)
    assert "(3 reads)" in found.reason


@pytest.mark.parametrize(
    ("code", "damaged"),
    [(errno.EIO, True), (errno.ENOENT, True), (errno.ENOTCONN, False), (errno.ESTALE, False), (errno.EACCES, False)],
)
def test_an_error_of_one_file_is_damage_and_of_the_disk_is_not(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, code: int, damaged: bool
) -> None:
    def refuse(self: LocalStorage, *where: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(LocalStorage, "read", refuse)
    if damaged:
        found = read_sample(dataset.tars, draws(dataset)[0])
        assert isinstance(found, Damage) and os.strerror(code) in found.reason
        Path(dataset.storage.root, INDEX_NAME).unlink()  # as when a mount drops
    with pytest.raises(UnavailableError, match="no sample was masked"):
        read_sample(dataset.tars, draws(dataset)[0])


def test_whole_bytes_that_are_no_sample(dataset: Dataset) -> None:
    """What a checksum cannot see, since it was built so."""
    spans = [dataset.storage.read("000000.tar", draw.offset, draw.span) for draw in draws(dataset)]
    assert parse_sample(spans[0], 0).key == "toy-00000"
    with pytest.raises(FormatError, match="no size in the tar header"):
        parse_sample(spans[0][:512] + spans[0], 0)
    with pytest.raises(ReadError, match="members of 2 samples"):
        parse_sample(spans[0] + spans[1], 0)
    with pytest.raises(ReadError, match=r"KeyError: 'tokens2.npy'"):
        parse_sample(spans[0], 2)
    with pytest.raises(ReadError, match="JSONDecodeError"):
        parse_sample(spans[0].replace(b'{"dataset"', b'x"dataset"'), 0)
    dtype = b"'descr': [('id', '<i4'), ('branch', '<i2'), ('weight', '<f4')]"
    pickled = spans[0].replace(dtype, b"'descr': '|O'".ljust(len(dtype)))
    assert pickled != spans[0]
    with pytest.raises(ReadError, match=r"no \.npy rows"):
        parse_sample(pickled, 0)
    assert np.array_equal(parse_sample(spans[0], 1).tokens, make_sample("toy", 0).variants[1])


def test_the_record_of_a_sample_without_visuals_is_not_parsed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the texts of every variant, which took longer than all else about a text."""
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    for draw in draws(dataset):
        assert isinstance(read_sample(dataset.tars, draw), StoredSample)
    assert len(parsed) == sum(draw.num_crops > 0 for draw in draws(dataset)) < len(dataset.sidecars[0])
