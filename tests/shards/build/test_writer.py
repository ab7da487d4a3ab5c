"""One shard: bytes that depend on the samples alone, spans that are true, and what a plain reader sees."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from shards.build.writer import WriteError, npy_bytes, write_shard
from shards.format import TOKEN_DTYPE, index_dtype, key_hash, span_hash, tar_members
from shards.layout import VisualLayout, VisualTokens, expand
from shards.media.jpeg import decode_jpeg, encode_jpeg
from shards.schema import Sample

LAYOUT = VisualLayout(
    tokens=VisualTokens.after(512), crop_size=48, patch_size=8, overlap_margin=1, image_pool=2, video_pool=3
)


def sample(number: int, num_frames: int = 2) -> Sample:
    """Frames, one branch of text; variant 1 shows the first frame only."""
    rng = np.random.Generator(np.random.Philox(number))
    shown = [list(range(num_frames)), [0] if num_frames else []]
    variants = []
    for frames in shown:
        text = rng.integers(2, 500, 5 + number % 4)
        rows = [(1, 0, 0.0), *((LAYOUT.tokens.video, 0, 0.0) for _ in frames), *((int(i), 1, 0.25) for i in text)]
        variants.append(np.array(rows, TOKEN_DTYPE))
    record = {
        "key": f"s-{number}",
        "text": "digit \N{GREEK SMALL LETTER PI}",
        "visuals": [{"kind": "frame", "view": i, "time": i / 2} for i in range(num_frames)],
        "variants": [{"messages": [], "visuals": frames} for frames in shown],
    }
    images = tuple(encode_jpeg(rng.integers(0, 256, (48, 48, 3), np.uint8)) for _ in range(num_frames))
    return Sample(key=f"s-{number}", record=record, variants=tuple(variants), images=images)


def test_spans_are_those_that_tarfile_sees(tmp_path: Path) -> None:
    samples = [sample(i, i % 3) for i in range(7)]
    info, rows = write_shard(tmp_path / "a.tmp", "000003", samples, LAYOUT, 2)
    data = (tmp_path / "a.tmp").read_bytes()
    assert (info.name, info.bytes, info.samples) == ("000003", len(data), 7)
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    assert info.index_sha256 == hashlib.sha256(npy_bytes(rows)).hexdigest()
    assert rows.dtype == index_dtype(2)
    with tarfile.open(tmp_path / "a.tmp") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uname, m.gname, m.uid, m.gid, m.mode) for m in members} == {
        (0, "nanomolmo2", "nanomolmo2", 0, 0, 0o444)
    }
    starts = {m.name.split(".")[0]: m.offset for m in reversed(members)}
    for row, stored in zip(rows, samples, strict=True):
        assert row["offset"] == starts[stored.key]
        span = data[row["offset"] : row["offset"] + row["span"]]
        assert row["xxh64"] == span_hash(span)
        assert row["key_hash"] == key_hash(stored.key)
        assert len(tar_members(span)) == 3 + len(stored.images)
    assert rows["offset"][1:].tolist() == (rows["offset"] + rows["span"])[:-1].tolist()


def test_lengths_are_those_of_the_expanded_sample(tmp_path: Path) -> None:
    samples = [sample(i, i % 3) for i in range(5)]
    _, rows = write_shard(tmp_path / "a.tmp", "000000", samples, LAYOUT, 2)
    for row, stored in zip(rows, samples, strict=True):
        for k, tokens in enumerate(stored.variants):
            visuals = [stored.record["visuals"][i] for i in stored.record["variants"][k]["visuals"]]
            assert row["num_tokens"][k] == len(expand(LAYOUT, tokens, visuals).input_ids)
            assert row["num_crops"][k] == len(visuals)
            assert row["loss_weight"][k] == pytest.approx(tokens["weight"].sum())
        assert row["num_frames"] == len(stored.record["visuals"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files to the collector
def test_plain_webdataset_sees_every_field(tmp_path: Path) -> None:
    samples = [sample(i, i % 3) for i in range(5)]
    write_shard(tmp_path / "000000.tar", "000000", samples, LAYOUT, 2)
    found = list(wds.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False).decode("rgb8"))
    assert len(found) == len(samples)
    for read, stored in zip(found, samples, strict=True):
        assert read.pop("__key__") == stored.key
        assert read.pop("json") == stored.record
        for k, tokens in enumerate(stored.variants):
            np.testing.assert_array_equal(read.pop(f"tokens{k}.npy"), tokens)
        for number, image in enumerate(stored.images):
            np.testing.assert_array_equal(read.pop(f"{number:03d}.jpg"), decode_jpeg(image))
        assert all(name.startswith("__") for name in read)


def test_equal_samples_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the time nor the user is in the file."""
    write_shard(tmp_path / "a", "000000", [sample(1)], LAYOUT, 2)
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setattr("time.time", lambda: 4e9)
    write_shard(tmp_path / "b", "000000", [sample(1)], LAYOUT, 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_shard_is_a_tar(tmp_path: Path) -> None:
    info, rows = write_shard(tmp_path / "a", "000000", [], LAYOUT, 2)
    assert (info.samples, len(rows)) == (0, 0)
    with tarfile.open(tmp_path / "a") as tar:
        assert tar.getmembers() == []


def test_what_the_format_forbids_is_refused(tmp_path: Path) -> None:
    good = sample(1)
    other = np.zeros(3, np.int64)
    bad = {
        r"key 's\.1'": [Sample(key="s.1", record=good.record, variants=good.variants)],
        r"key ''": [Sample(key="", record=good.record, variants=good.variants)],
        "s-1 occurs twice": [good, sample(2), good],
        "2 variants of": [Sample(key="s-1", record=good.record, variants=good.variants[:1])],
        "sample s-1: 2 variants of": [Sample(key="s-1", record=good.record, variants=(other, other))],
    }
    for match, samples in bad.items():
        with pytest.raises(WriteError, match=match):
            write_shard(tmp_path / "a", "000000", samples, LAYOUT, 2)


def test_token_files_are_never_pickled() -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        npy_bytes(np.array([object()]))
    assert np.load(io.BytesIO(npy_bytes(np.arange(3))), allow_pickle=False).tolist() == [0, 1, 2]
