"""Verification: recompute everything that a dataset's index claims, and name what does not hold.

Reads every byte. A dataset is damaged when a file is missing or of other bytes, when the tar's members are not the
samples that the sidecar lists, or when a sample does not expand to the lengths that the plan would pack by.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards import media
from shards.format import (
    BLOCK,
    INDEX_NAME,
    KEY_PATTERN,
    TOKEN_DTYPE,
    DatasetIndex,
    FormatError,
    ShardInfo,
    check_sidecar,
    key_hash,
    parse_index,
    span_hash,
    tar_members,
)
from shards.layout import VisualLayout, expand, sample_visuals, visual_crops
from shards.storage import Storage, open_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, and where: `shard` and `key` are empty, `offset` -1, where they do not apply."""

    dataset: str
    problem: str
    shard: str = ""
    key: str = ""
    offset: int = -1

    def __str__(self) -> str:
        place = [self.dataset, self.shard, self.key, f"byte {self.offset}" if self.offset >= 0 else ""]
        return f"{' / '.join(part for part in place if part)}: {self.problem}"


def find_datasets(root: Path) -> list[Path]:
    """Every folder at or below `root` that holds shards or an index."""
    marks = {path.parent for pattern in (INDEX_NAME, "*.tar", "build.json") for path in root.rglob(pattern)}
    return sorted(marks)


def verify_dataset(folder: Path) -> Iterator[Finding | ShardInfo]:
    """Findings of a dataset, and each shard when it has been read, for a progress bar."""
    storage, name = open_storage(folder), folder.name
    try:
        index = parse_index(storage.read(INDEX_NAME), f"{folder}/{INDEX_NAME}")
        layout = VisualLayout.from_json(index.processor["layout"])
    except FileNotFoundError:
        yield Finding(dataset=name, problem=f"no {INDEX_NAME}: the build has not finished; run tools/build_shards.py")
        return
    except (FormatError, KeyError, TypeError) as error:
        yield Finding(dataset=name, problem=f"unusable {INDEX_NAME}: {error}")
        return
    seen: dict[str, str] = {}
    for shard in index.shards:
        for finding in _verify_shard(storage, index, shard, layout, seen):
            yield Finding(dataset=name, shard=f"{shard.name}.tar", **finding)
        yield shard
    listed = {shard.name for shard in index.shards}
    for extra in sorted({n[:-4] for n in storage.list(".tar")} - listed):
        yield Finding(dataset=name, shard=f"{extra}.tar", problem="not in the index")
    if len(seen) != index.totals.samples:
        yield Finding(dataset=name, problem=f"{len(seen)} samples, the index says {index.totals.samples}")


def _verify_shard(
    storage: Storage, index: DatasetIndex, shard: ShardInfo, layout: VisualLayout, seen: dict[str, str]
) -> Iterator[dict[str, Any]]:
    try:
        data, sidecar = storage.read(f"{shard.name}.tar"), storage.read(f"{shard.name}.idx.npy")
    except FileNotFoundError as error:
        yield {"problem": f"missing file: {error.filename}"}
        return
    if len(data) != shard.bytes or hashlib.sha256(data).hexdigest() != shard.sha256:
        yield {"problem": f"{len(data)} bytes and other sha256 than the index says ({shard.bytes} bytes)"}
    if hashlib.sha256(sidecar).hexdigest() != shard.index_sha256:
        yield {"problem": "the sidecar has another sha256 than the index says"}
        return
    rows = np.load(io.BytesIO(sidecar), allow_pickle=False)
    check_sidecar(rows, shard, index.num_variants, f"{shard.name}.idx.npy")
    end = 0
    for row in rows:
        offset, span = int(row["offset"]), int(row["span"])
        if offset != end:
            yield {"problem": f"sample at byte {offset}, but the one before ends at {end}", "offset": offset}
        end = offset + span
        for problem, key in _verify_sample(data[offset:end], row, index.num_variants, layout):
            yield {"problem": problem, "key": key, "offset": offset}
        key = _key(data[offset : offset + BLOCK])
        if key in seen:
            yield {"problem": f"key occurs twice, first in {seen[key]}", "key": key, "offset": offset}
        seen[key] = f"{shard.name}.tar"
    if data[end:].strip(b"\0"):
        yield {"problem": "bytes after the last sample", "offset": end}


def _verify_sample(
    span: bytes, row: npt.NDArray[np.void], num_variants: int, layout: VisualLayout
) -> Iterator[tuple[str, str]]:
    key = _key(span[:BLOCK])
    if len(span) != row["span"]:
        yield f"cut short: {len(span)} of {int(row['span'])} bytes", key
        return
    if span_hash(span) != row["xxh64"]:
        yield f"checksum {span_hash(span):016x}, the sidecar says {int(row['xxh64']):016x}", key
        return
    try:
        members = tar_members(span)
        if {name.split(".", 1)[0] for name in members} != {key} or not KEY_PATTERN.fullmatch(key):
            raise ValueError(f"members of other samples: {', '.join(sorted(members))[:200]}")
        if key_hash(key) != row["key_hash"]:
            raise ValueError("the sidecar's key_hash is another key's")
        _verify_content({n.split(".", 1)[1]: d for n, d in members.items()}, row, num_variants, layout)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        yield f"{type(error).__name__}: {error}", key


def _verify_content(
    files: dict[str, bytes], row: npt.NDArray[np.void], num_variants: int, layout: VisualLayout
) -> None:
    """Raise ValueError, KeyError or IndexError where files and sidecar row disagree."""
    record = json.loads(files["json"])
    images = {int(n[:-4]): media.decode_jpeg(d).shape for n, d in files.items() if n.endswith(".jpg")}
    expected = {"json", *(f"tokens{k}.npy" for k in range(num_variants)), *(f"{i:03d}.jpg" for i in range(len(images)))}
    if set(files) != expected:
        raise ValueError(f"members {sorted(set(files) ^ expected)} are missing or unexpected")
    size = layout.crop_size
    for visual in record["visuals"]:
        if images[visual["view"]] != (size, size, 3):
            raise ValueError(f"image {visual['view']} is {images[visual['view']]}, wanted {size} x {size}")
        if visual["kind"] == "image" and images[visual["canvas"]][:2] != layout.canvas_size(tuple(visual["tiling"])):
            raise ValueError(
                f"image {visual['canvas']} is {images[visual['canvas']]}, not of tiling {visual['tiling']}"
            )
    for k in range(num_variants):
        tokens = np.load(io.BytesIO(files[f"tokens{k}.npy"]), allow_pickle=False)
        if tokens.dtype != TOKEN_DTYPE:
            raise ValueError(f"variant {k}: tokens of dtype {tokens.dtype}")
        visuals = sample_visuals(record, k)
        expanded = expand(layout, tokens, visuals)
        found = {
            "num_tokens": len(expanded.input_ids),
            "num_crops": sum(visual_crops(visual) for visual in visuals),
            "loss_weight": np.float32(np.sum(tokens["weight"], dtype=np.float64)),
        }
        wrong = [
            f"{name} {value}, the sidecar says {row[name][k]}" for name, value in found.items() if value != row[name][k]
        ]
        if wrong:
            raise ValueError(f"variant {k}: {'; '.join(wrong)}")


def _key(header: bytes) -> str:
    """The key in a tar header, readable even where the header is damaged."""
    return header[:100].split(b"\0")[0].decode("ascii", "replace").split(".", 1)[0]
