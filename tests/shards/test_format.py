"""The index: parsing, refusals, digests."""

import json

import numpy as np
import pytest

from shards.format import FormatError, ShardInfo, check_sidecar, index_dtype, key_hash, parse_index

INDEX = {
    "format_version": 2,
    "dataset": "toy",
    "stage": "sft",
    "num_variants": 4,
    "processor": {"chat_format": 1},
    "source": {},
    "build": {"workers": 3},
    "totals": {"samples": 2, "annotations": 2, "tokens": 9, "crops": 0, "frames": 0, "bytes": 1024, "rejects": 0},
    "shards": [
        {
            **{"name": "000000", "bytes": 1024, "sha256": "0" * 64, "samples": 2, "index_sha256": "1" * 64},
            **{"max_tokens": 5, "max_crops": 0},
        }
    ],
}


def test_digest_depends_on_samples_and_processor_alone() -> None:
    index = parse_index(json.dumps(INDEX).encode(), "index.json")
    same = parse_index(json.dumps({**INDEX, "build": {"workers": 1}}).encode(), "index.json")
    other = parse_index(json.dumps({**INDEX, "processor": {"chat_format": 2}}).encode(), "index.json")
    assert index.digest == same.digest != other.digest
    assert index.digest == "c46dc49a0e37231a"  # pinned: a change here orphans every checkpoint


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"{", "not JSON"),
        (json.dumps({**INDEX, "format_version": 1}).encode(), "format version 1, this code reads 2.*--reindex"),
        (json.dumps({**INDEX, "extra": 1}).encode(), "extra"),
        (json.dumps({**INDEX, "shards": [{**INDEX["shards"][0], "name": "../x"}]}).encode(), "name"),  # type: ignore[index]
        (b"[]", "format version None"),
    ],
)
def test_foreign_indexes_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        parse_index(data, "here/index.json")


def test_sidecars_are_checked() -> None:
    shard = ShardInfo.model_validate(INDEX["shards"][0])  # type: ignore[index]
    check_sidecar(np.zeros(2, index_dtype(4)), shard, 4, "000000.idx.npy")
    with pytest.raises(FormatError, match="3 rows"):
        check_sidecar(np.zeros(3, index_dtype(4)), shard, 4, "000000.idx.npy")
    with pytest.raises(FormatError, match="dtype"):
        check_sidecar(np.zeros(2, index_dtype(3)), shard, 4, "000000.idx.npy")


def test_key_hash_is_pinned() -> None:
    assert key_hash("demo-00000001") == 3_847_390_977
