"""Verifying a dataset: recompute everything that its index states, and report each difference.

Every byte is read. A dataset is damaged if a file is missing or has another hash, if the members of a tar are not the
samples that the sidecar lists, or if a sample does not expand to the lengths that the plan packs by.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.asked import read_asked
from shards.build.writer import row_facts
from shards.format import (
    ASKED_NAME,
    INDEX_NAME,
    KEY_PATTERN,
    ODD_SAMPLE,
    REJECTS_NAME,
    TOKEN_DTYPE,
    DatasetIndex,
    FormatError,
    ShardInfo,
    check_sidecar,
    index_dtype,
    key_hash,
    parse_index,
    printable,
    read_rows,
    span_hash,
    stored_variant,
    tar_members,
)
from shards.layout import VisualLayout, allowed_pairs, expand, sample_visuals, visual_crops
from shards.media.jpeg import decode_jpeg, jpeg_size
from shards.storage.base import Storage
from shards.storage.open import open_storage
from shards.tar_headers import whole_headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One damage and its location; `shard` and `key` are empty and `offset` is -1 if they do not apply."""

    dataset: str
    problem: str
    shard: str = ""
    key: str = ""
    offset: int = -1

    def __str__(self) -> str:
        place = [self.dataset, self.shard, self.key, f"byte {self.offset}" if self.offset >= 0 else ""]
        return printable(f"{' / '.join(part for part in place if part)}: {self.problem}")


def find_datasets(root: str) -> list[str]:
    """Every folder at or below `root`, a path or a URL, that holds shards or an index."""
    storage = open_storage(root)
    try:
        marks = [name for suffix in (INDEX_NAME, ".tar", "build.json") for name in storage.list(suffix)]
    except io.UnsupportedOperation:  # a web server; the folder may be a dataset's own
        if storage.size(INDEX_NAME) is None:
            raise
        return [root.rstrip("/")]
    return sorted({posixpath.join(root.rstrip("/"), posixpath.dirname(name)).rstrip("/") for name in marks})


def verify_dataset(folder: str) -> Iterator[Finding | ShardInfo]:
    """Verify a dataset: yields findings, and each shard once it is read (for a progress bar). `folder`: path or URL."""
    storage, name = open_storage(folder), posixpath.basename(folder.rstrip("/"))
    try:
        index = parse_index(storage.read(INDEX_NAME), f"{folder}/{INDEX_NAME}")
        layout = VisualLayout.from_json(index.processor["layout"])
    except FileNotFoundError:
        yield Finding(dataset=name, problem=f"no {INDEX_NAME}: the build has not finished; run tools/build_shards.py")
        return
    except ODD_SAMPLE as error:
        yield Finding(dataset=name, problem=f"unusable {INDEX_NAME}: {error}")
        return
    seen: dict[str, str] = {}
    sums: Counter[str] = Counter()
    for shard in index.shards:
        for finding in _verify_shard(storage, index, shard, layout, seen, sums):
            yield Finding(dataset=name, shard=f"{shard.name}.tar", **finding)
        yield shard
    for extra in _unlisted(storage, index):
        yield Finding(dataset=name, shard=f"{extra}.tar", problem="not in the index")
    sums["rejects"] = storage.read(REJECTS_NAME).count(b"\n") if storage.size(REJECTS_NAME) else 0
    for total, value in index.totals.model_dump().items():
        if sums[total] != value:
            yield Finding(dataset=name, problem=f"{sums[total]} {total}, the index says {value}")


def _unlisted(storage: Storage, index: DatasetIndex) -> list[str]:
    """Shards that the index does not have; none for a web server, which lists no files."""
    try:
        return sorted({name[:-4] for name in storage.list(".tar")} - {shard.name for shard in index.shards})
    except io.UnsupportedOperation:
        return []


def _verify_shard(
    storage: Storage,
    index: DatasetIndex,
    shard: ShardInfo,
    layout: VisualLayout,
    seen: dict[str, str],
    sums: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield the problems of a shard; its keys are added to `seen`, its counts to `sums`."""
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
    try:
        rows = read_rows(sidecar, index_dtype(index.num_variants))
        check_sidecar(rows, shard, index.num_variants, f"{shard.name}.idx.npy")
    except ValueError as error:
        yield {"problem": f"unusable sidecar: {error}"}
        return
    facts, listed = row_facts(rows, sidecar), shard.model_dump()
    for name, value in facts.items():
        if value != listed[name]:
            yield {"problem": f"{name} {value} in the sidecar, {listed[name]} in the index"}
    sums.update(samples=len(rows), bytes=len(data), frames=int(rows["num_frames"].sum()))
    sums.update(tokens=int(rows["num_tokens"][:, 0].sum()), crops=int(rows["num_crops"][:, 0].sum()))
    end = 0
    for row in rows:
        offset, span = int(row["offset"]), int(row["span"])
        if offset != end:
            yield {"problem": f"sample at byte {offset}, but the one before ends at {end}", "offset": offset}
        end = offset + span
        key = _key(data[offset:end], int(row["key_hash"]))
        try:
            sums["annotations"] += verify_span(data[offset:end], key, row, index.num_variants, layout)
        except ODD_SAMPLE as error:
            problem = str(error) if isinstance(error, FormatError) else f"{type(error).__name__}: {error}"
            yield {"problem": problem, "key": key, "offset": offset}
        if key and key in seen:
            yield {"problem": f"key occurs twice, first in {seen[key]}", "key": key, "offset": offset}
        seen[key] = f"{shard.name}.tar"
    if data[end:].strip(b"\0"):
        yield {"problem": "bytes after the last sample", "offset": end}


def verify_span(span: bytes, key: str, row: npt.NDArray[np.void], num_variants: int, layout: VisualLayout) -> int:
    """Verify the bytes and the content of a sample; returns its number of annotations.

    Raises:
        FormatError: something differs from the sidecar.
        ODD_SAMPLE: any of these exceptions: a member cannot be parsed.
    """
    if len(span) != row["span"]:
        raise FormatError(f"cut short: {len(span)} of {int(row['span'])} bytes")
    if span_hash(span) != row["xxh64"]:
        raise FormatError(f"checksum {span_hash(span):016x}, the sidecar says {int(row['xxh64']):016x}")
    members = tar_members(span)
    if {name.split(".", 1)[0] for name in members} != {key} or not KEY_PATTERN.fullmatch(key):
        raise FormatError(f"members of other samples: {', '.join(sorted(members))[:200]}")
    if key_hash(key) != row["key_hash"]:
        raise FormatError("the sidecar's key_hash is another key's")
    return _verify_content({n.split(".", 1)[1]: bytes(d) for n, d in members.items()}, row, num_variants, layout)


def _verify_content(files: dict[str, bytes], row: npt.NDArray[np.void], num_variants: int, layout: VisualLayout) -> int:
    """Compare a sample's files with its sidecar row; returns its number of annotations. Raises like `verify_span`."""
    record = json.loads(files["json"])
    num_stored = 1 + stored_variant(files, num_variants - 1)
    asked_names = {ASKED_NAME} & set(files)
    expected = asked_names | {
        "json",
        *(f"tokens{k}.npy" for k in range(num_stored)),
        *(f"{i:03d}.jpg" for i in range(sum(name.endswith(".jpg") for name in files))),
    }
    if set(files) != expected:
        raise FormatError(f"members {sorted(set(files) ^ expected)} are missing or unexpected")
    if len(record["variants"]) != num_stored:
        raise FormatError(f"{len(record['variants'])} variants in the record, {num_stored} members of tokens")
    verify_images(files, record["visuals"], layout)
    num_frames = sum(visual["kind"] == "frame" for visual in record["visuals"])
    if num_frames != row["num_frames"]:
        raise FormatError(f"{num_frames} frames, the sidecar says {row['num_frames']}")
    annotations, num_asked = 0, len(read_asked(files[ASKED_NAME])) if asked_names else None
    for k in range(num_variants):
        tokens = read_rows(files[f"tokens{stored_variant(files, k)}.npy"], TOKEN_DTYPE)
        if not (np.isfinite(tokens["weight"]) & (tokens["weight"] >= 0)).all():
            raise FormatError(f"variant {k}: a loss weight is negative, infinite or undefined")
        visuals = sample_visuals(record, k)
        num_crops = sum(visual_crops(visual) for visual in visuals)
        if num_crops > row["num_crops"][k]:  # compared first, since a tiling could fill the memory
            raise FormatError(f"variant {k}: num_crops {num_crops}, the sidecar says {row['num_crops'][k]}")
        expanded = expand(layout, tokens, visuals)
        facts = {
            "num_tokens": len(expanded.input_ids),
            "num_crops": num_crops,
            "num_pairs": np.float32(allowed_pairs(expanded)),
            "loss_weight": np.float32(np.sum(tokens["weight"], dtype=np.float64)),
        }
        wrong = [
            f"{name} {value}, the sidecar says {row[name][k]}" for name, value in facts.items() if value != row[name][k]
        ]
        if wrong:
            raise FormatError(f"variant {k}: {'; '.join(wrong)}")
        annotations = annotations if k else int(tokens["branch"][-1])
    if num_asked not in {None, annotations}:
        raise FormatError(f"{num_asked} annotations in {ASKED_NAME}, {annotations} branches")
    return annotations


def verify_images(files: dict[str, bytes], visuals: list[dict[str, Any]], layout: VisualLayout) -> None:
    """Compare the sizes in the headers of the images with the visuals, then decode them: a small file can be of any.

    Raises:
        FormatError, ODD_SAMPLE: an image is missing, damaged, of another size, or of no visual.
    """
    images = {int(name[:-4]): jpeg_size(data) for name, data in files.items() if name.endswith(".jpg")}
    for visual in visuals:
        visual_crops(visual)  # raises for an odd tiling
    size = layout.crop_size
    for visual in visuals:
        if images[visual["view"]] != (size, size):
            raise FormatError(f"image {visual['view']} is {images[visual['view']]}, wanted {size} x {size}")
        if visual["kind"] == "image" and images[visual["canvas"]] != layout.canvas_size(tuple(visual["tiling"])):
            raise FormatError(
                f"image {visual['canvas']} is {images[visual['canvas']]}, not of tiling {visual['tiling']}"
            )
    used = {visual[name] for visual in visuals for name in ("view", "canvas") if name in visual}
    for number in images:
        if number not in used:
            raise FormatError(f"image {number} belongs to no visual")
        decode_jpeg(files[f"{number:03d}.jpg"])


def _key(span: bytes, hashed: int) -> str:
    """The key of a sample: the one whose hash is in the sidecar, if a header has it, else that of the first header."""
    keys = [key for _, _, key in whole_headers(span)]
    return next((key for key in keys if key_hash(key) == hashed), keys[0] if keys else "")
