"""Writing one shard: its samples as a tar, and a sidecar row for each.

The tar is plain webdataset. Its bytes depend only on the samples, and not on time, user or number of workers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards import asked
from shards.format import (
    ASKED_NAME,
    BLOCK,
    KEY_PATTERN,
    TOKEN_DTYPE,
    ShardInfo,
    canonical_json,
    index_dtype,
    key_hash,
    span_hash,
)
from shards.layout import VisualLayout, allowed_pairs, expand, sample_visuals, visual_crops
from shards.schema import Sample

OWNER = "nanomolmo2"  # user and group in every tar header


class WriteError(ValueError):
    """A sample violates the format. This is a bug of the converter or processor, not of the data."""


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array as the bytes of a .npy file, format 1.0, never pickled."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def members(sample: Sample) -> dict[str, bytes]:
    """The files of a sample: name after the key -> content."""
    sample = _with_equal_variants_once(sample)
    files = {"json": canonical_json(sample.record)}
    files |= {f"tokens{k}.npy": npy_bytes(tokens) for k, tokens in enumerate(sample.variants)}
    files |= {f"{number:03d}.jpg": image for number, image in enumerate(sample.images)}
    return files | ({ASKED_NAME: asked.asked_bytes(sample.asked)} if sample.asked else {})


def _with_equal_variants_once(sample: Sample) -> Sample:
    """The sample with one variant if all are equal, as for a text in which nothing is drawn."""
    (tokens, *others), (entry, *entries) = sample.variants, sample.record["variants"]
    if any(not np.array_equal(tokens, other) for other in others) or any(other != entry for other in entries):
        return sample
    return replace(sample, variants=(tokens,), record={**sample.record, "variants": [entry]})


def index_row(layout: VisualLayout, sample: Sample) -> npt.NDArray[np.void]:
    """The sidecar row of a sample, a scalar of `index_dtype`; its offset, span and hash are still 0."""
    row = np.zeros((), index_dtype(len(sample.variants)))
    row["key_hash"] = key_hash(sample.key)
    row["num_frames"] = sum(visual["kind"] == "frame" for visual in sample.record["visuals"])
    for k, tokens in enumerate(sample.variants):
        visuals = sample_visuals(sample.record, k)
        expanded = expand(layout, tokens, visuals)
        row["num_crops"][k] = sum(visual_crops(visual) for visual in visuals)
        row["num_tokens"][k] = len(expanded.input_ids)
        row["num_pairs"][k] = allowed_pairs(expanded)
        row["loss_weight"][k] = np.sum(tokens["weight"], dtype=np.float64)
    return row


def check_sample(sample: Sample, num_variants: int) -> None:
    """Check that a reader can read a sample.

    Raises:
        WriteError: the key has forbidden characters, tokens have another dtype, or the number of variants differs.
    """
    if not KEY_PATTERN.fullmatch(sample.key):
        raise WriteError(f"key {sample.key!r}: letters, digits, '-' and '_' only, at most 80")
    if len(sample.variants) != num_variants or any(tokens.dtype != TOKEN_DTYPE for tokens in sample.variants):
        raise WriteError(f"sample {sample.key}: {num_variants} variants of {TOKEN_DTYPE} were expected")


def write_shard(
    path: Path, name: str, samples: Iterable[Sample], layout: VisualLayout, num_variants: int
) -> tuple[ShardInfo, npt.NDArray[np.void]]:
    """Write the tar of shard `name` (six digits) to the temporary file `path`.

    Returns:
        The shard's entry in the index, and the rows of its sidecar, which the caller writes.

    Raises:
        WriteError: see `check_sample`; or a key occurs twice.
    """
    import webdataset  # imported here because it imports torch, which decoding processes do not need

    rows: list[npt.NDArray[np.void]] = []
    seen: set[str] = set()
    # No encoder, because values are bytes. Offsets are those of the tar stream, which buffers its writes.
    with (
        open(path, "wb") as file,
        webdataset.TarWriter(file, mtime=0, user=OWNER, group=OWNER, encoder=False) as writer,
    ):
        tar = writer.tarstream
        for sample in samples:
            check_sample(sample, num_variants)
            if sample.key in seen:
                raise WriteError(f"key {sample.key} occurs twice in shard {name}")
            seen.add(sample.key)
            row = index_row(layout, sample)
            row["offset"] = tar.offset
            writer.write({"__key__": sample.key, **members(sample)})
            # tarfile pads every member to whole blocks, so a sample ends where the next one begins.
            row["span"] = tar.offset - int(row["offset"])
            assert row["span"] % BLOCK == 0
            rows.append(row)
    table = np.stack(rows) if rows else np.zeros(0, index_dtype(num_variants))
    with open(path, "rb") as written:
        for row in table:
            written.seek(int(row["offset"]))
            row["xxh64"] = span_hash(written.read(int(row["span"])))
        written.seek(0)
        sha256 = hashlib.file_digest(written, "sha256").hexdigest()
    info = ShardInfo(
        name=name,
        bytes=path.stat().st_size,
        sha256=sha256,
        **row_facts(table, npy_bytes(table)),
    )
    return info, table


def row_facts(rows: npt.NDArray[np.void], data: bytes) -> dict[str, Any]:
    """What a shard's entry in the index says about its sidecar; `data` are the bytes of the file."""
    return {
        "samples": len(rows),
        "index_sha256": hashlib.sha256(data).hexdigest(),
        "max_tokens": int(rows["num_tokens"].max(initial=0)),
        "max_crops": int(rows["num_crops"].max(initial=0)),
    }
