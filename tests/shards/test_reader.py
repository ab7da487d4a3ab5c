"""Damage in a shard: every flipped byte and every cut is found and named, and only the sample it hits is lost."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy import make_sample, write_dataset

import shards.reader
from shards.dataset import Dataset, open_dataset
from shards.format import FormatError
from shards.plan import Draw
from shards.reader import Damage, ReadError, StoredSample, parse_sample, read_sample
from shards.storage import LocalStorage


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.reader, "PAUSE", 0.0)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_dataset(tmp_path, "toy", 5)
    return open_dataset(str(tmp_path), "toy")


def draws(dataset: Dataset, variant: int = 0) -> list[Draw]:
    """Every sample of the first shard."""
    return [
        Draw(0, 0, i, variant, *(row[f].item() for f in ("offset", "span", "xxh64")), 0, 0, 0.0)
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


def test_every_flipped_byte_is_found_and_named(dataset: Dataset) -> None:
    """Two prime strides, a short one through headers: the sample that holds the byte is lost, and no other."""
    tar = Path(dataset.storage.root, "000000.tar")
    good = tar.read_bytes()
    spans = [(draw.offset, draw.offset + draw.span) for draw in draws(dataset)]
    headers = {start + i for start, _ in spans for i in range(0, 512, 13)}
    for position in sorted(headers | set(range(0, spans[-1][1], 487))):
        tar.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        hit = [start <= position < end for start, end in spans]
        found = read_all(dataset)
        assert [isinstance(sample, Damage) for sample in found] == hit
        damage = next(sample for sample in found if isinstance(sample, Damage))
        assert (damage.dataset, damage.shard, damage.row) == ("toy", "000000", hit.index(True))
        assert damage.offset == spans[damage.row][0]
        assert "checksum" in damage.reason and "expected" in damage.reason


def test_every_truncation_is_found_and_named(dataset: Dataset) -> None:
    tar = Path(dataset.storage.root, "000000.tar")
    good = tar.read_bytes()
    for size in range(0, draws(dataset)[-1].offset + draws(dataset)[-1].span, 512):
        tar.write_bytes(good[:size])
        found = read_all(dataset)
        for draw, sample in zip(draws(dataset), found, strict=True):
            if draw.offset + draw.span <= size:
                assert isinstance(sample, StoredSample)
            else:
                assert isinstance(sample, Damage)
                assert f"expected {draw.span}: the file is cut short" in sample.reason
    tar.unlink()
    assert all("No such file" in str(sample) for sample in read_all(dataset))


def test_the_key_is_told_where_it_can_be_read(dataset: Dataset) -> None:
    tar = Path(dataset.storage.root, "000000.tar")
    good = bytearray(tar.read_bytes())
    good[draws(dataset)[1].offset + 600] ^= 1
    good[draws(dataset)[2].offset] ^= 0x80
    tar.write_bytes(good)
    found = read_all(dataset)
    assert str(found[1]).startswith("toy/000000.tar, sample 1 (toy-00001) at byte ")
    assert "sample 2 (None)" in str(found[2])


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
    found = read_sample(dataset.tars, draws(dataset)[0])
    assert isinstance(found, Damage)
    assert "(3 reads)" in found.reason


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
    with pytest.raises(ReadError, match="Object arrays cannot be loaded"):
        parse_sample(pickled, 0)
    assert np.array_equal(parse_sample(spans[0], 1).tokens, make_sample("toy", 0).variants[1])
