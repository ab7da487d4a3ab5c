"""Shard format, version 3: names, dtypes and the index, shared by the builder and the reader.

`docs/shard-format.md` is the specification. The functions here work on bytes and arrays: they open no file and need no
tokenizer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Container
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic
import xxhash

FORMAT_VERSION = 3  # 2: allowed pairs of every sample, largest lengths of every shard; 3: equal variants stored once
BLOCK = 512  # bytes; tar headers and contents begin at multiples of it
INDEX_NAME = "index.json"
ASKED_NAME = "asked.json.gz"  # member of a sample of stage "eval"; `shards.asked` reads it
REJECTS_NAME = "rejects.jsonl"
REPORT_NAME = "report.json"
# A key has no dots, because webdataset splits names at the first one. It is short so that names fit a plain tar header.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")

# One stored token. `branch` 0 is the shared trunk (BOS and visuals), annotation i is branch i + 1. `weight` is the
# loss weight of *predicting* this token. The last token of a branch (EOS) is a label only and never an input.
TOKEN_DTYPE = np.dtype([("id", "<i4"), ("branch", "<i2"), ("weight", "<f4")])


# Exceptions that members of any content raise when they are parsed, expanded or decoded.
ODD_SAMPLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class FormatError(ValueError):
    """A shard or an index is damaged, not of this format, or of another format version."""


@functools.lru_cache(maxsize=64)
def index_dtype(num_variants: int) -> np.dtype[np.void]:
    """Dtype of a row of `NNNNNN.idx.npy`: one row per sample, 26 + 14 K bytes, K being the number of variants.

    offset, span: the sample's byte range in the tar (first header to last padding block); xxh64: xxh3-64 of that
    span; key_hash: `key_hash(key)`; num_frames: video frames of the sample. Per variant [K]: num_crops (ViT inputs),
    num_tokens (expanded input tokens), num_pairs (pairs of tokens that attend to each other, `layout.allowed_pairs`,
    rounded to float32) and loss_weight (sum of the tokens' weights).
    """
    k = (num_variants,)
    return np.dtype(
        [
            ("offset", "<u8"),
            ("xxh64", "<u8"),
            ("span", "<u4"),
            ("key_hash", "<u4"),
            ("num_frames", "<u2"),
            ("num_crops", "<u2", k),
            ("num_tokens", "<u4", k),
            ("num_pairs", "<f4", k),
            ("loss_weight", "<f4", k),
        ]
    )


def key_hash(key: str) -> int:
    """32-bit hash of a key; it selects the text variant of an epoch: (epoch + hash) mod K."""
    return xxhash.xxh32_intdigest(key.encode())


def span_hash(data: bytes | memoryview) -> int:
    """xxh3-64 of a sample's bytes."""
    return xxhash.xxh3_64_intdigest(data)


def stored_variant(members: Container[str], variant: int) -> int:
    """The number of the token member that holds a variant: 0 if a sample has one member, because all are equal."""
    return variant if "tokens1.npy" in members else 0


def printable(text: str) -> str:
    """The text with escapes in place of control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def canonical_json(value: Any) -> bytes:
    """JSON bytes that depend on nothing but the value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(value: Any) -> str:
    """sha256 of `canonical_json(value)`, 16 hex digits: enough to distinguish settings, and short to print."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


Count = Annotated[int, pydantic.Field(ge=0)]
Sha256 = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]  # the cache names files by it


class ShardInfo(pydantic.BaseModel, extra="forbid", frozen=True):
    """Index entry of a shard, a tar and its sidecar. `name` is the stem of `000000.tar` and `000000.idx.npy`.

    `max_tokens` and `max_crops` are the largest of all samples and variants, so that a plan can compare them with its
    limits and need not read the sidecars.
    """

    name: str = pydantic.Field(pattern=r"^[0-9]{6}$")
    bytes: Count
    sha256: Sha256
    samples: Count
    index_sha256: Sha256
    max_tokens: Count
    max_crops: Count


class Totals(pydantic.BaseModel, extra="forbid", frozen=True):
    """Sums over the dataset. `annotations` counts the branches of all samples; `tokens`, `crops`: of variant 0."""

    samples: Count
    annotations: Count
    tokens: Count
    crops: Count
    frames: Count
    bytes: Count
    rejects: Count


class DatasetIndex(pydantic.BaseModel, extra="forbid", frozen=True):
    """Content of `index.json`. The file is written last, so its presence means that the dataset is complete.

    `processor` holds every setting that changes a token or a pixel (`processor["layout"]` is a `layout.VisualLayout`);
    `source` names the published dataset (repo, revision); `build` records the options of the build, and the reader
    needs none of them. `fitted` counts the samples that were changed to fit the limits of the stage, by kind.
    """

    format_version: int
    dataset: str
    stage: str
    num_variants: int = pydantic.Field(ge=1, le=64)
    processor: dict[str, Any]
    source: dict[str, Any]
    build: dict[str, Any]
    totals: Totals
    fitted: dict[str, int] = {}
    shards: tuple[ShardInfo, ...]

    @property
    def processor_fingerprint(self) -> str:
        """Digest of the processor's settings."""
        return digest(self.processor)

    @property
    def digest(self) -> str:
        """Digest of what the plan depends on: the samples (by the sidecars' hashes) and the processor's settings."""
        return digest([self.format_version, self.processor, [[s.name, s.samples, s.index_sha256] for s in self.shards]])


def parse_index(data: bytes, where: str) -> DatasetIndex:
    """Parse `index.json`.

    Raises:
        FormatError: the bytes are not JSON, a field is missing or unknown, or the format version is another one.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error}); rebuild the dataset with tools/build_shards.py") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{where}: shard format version {version!r}, this code reads {FORMAT_VERSION}; rebuild the dataset with "
            "tools/build_shards.py, or only its indexes, from the shards, with tools/verify_shards.py --reindex"
        )
    try:
        return DatasetIndex.model_validate(raw)
    except pydantic.ValidationError as error:
        raise FormatError(f"{where}: {error}") from None


def check_sidecar(rows: npt.NDArray[np.void], shard: ShardInfo, num_variants: int, where: str) -> None:
    """Check a loaded sidecar against its entry in the index.

    Raises:
        FormatError: the dtype or the number of rows differs.
    """
    if rows.dtype != index_dtype(num_variants):
        raise FormatError(f"{where}: sidecar dtype {rows.dtype} is not that of {num_variants} variants")
    if len(rows) != shard.samples:
        raise FormatError(f"{where}: {len(rows)} rows, index.json says {shard.samples}")


def npy_rows(data: bytes | memoryview, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Byte offset of the first row, and number of rows, of a one-dimensional .npy file (format 1.0) of `dtype`.

    The header is compared with the expected one and not parsed: numpy parses it with `ast`, which sometimes fails in
    threads (CPython 3.11), and an untrusted header should not be evaluated.

    Raises:
        FormatError: the array has another dtype or shape, or the file is shorter or longer than its header says.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    count, rest = divmod(len(data) - start, dtype.itemsize)
    head = bytes(data[:start])
    if rest or count < 0 or head[:8] != b"\x93NUMPY\x01\x00" or head[10:].rstrip() != _npy_header(dtype) % count:
        raise FormatError(f"no .npy rows of {dtype.names}: header {head[:200]!r}, then {len(data) - start} bytes")
    return start, count


def read_rows(data: bytes | memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The rows of such a file, as a view of its bytes; raises as `npy_rows`."""
    start, count = npy_rows(data, dtype)
    return np.frombuffer(data, dtype, count, start)


@functools.lru_cache(maxsize=64)
def _npy_header(dtype: np.dtype[Any]) -> bytes:
    """The .npy header of rows of a dtype, with `%d` in place of their number."""
    return f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': (%d,), }}".encode()


def tar_members(span: bytes) -> dict[str, memoryview]:
    """Parse a run of tar members: file name -> content, as views of `span`. Only plain headers are read.

    Raises:
        FormatError: a header is of another kind (the writer makes none), or a member ends past `span`.
    """
    members, position, view = {}, 0, memoryview(span)
    while position < len(span):
        header = span[position : position + BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        if len(header) < BLOCK or header[156:157] not in {b"0", b"\0"} or header[345:346] != b"\0":
            raise FormatError(f"no plain tar header at byte {position} of the sample")
        digits = header[124:136].rstrip(b"\0 ")
        if not digits.isdigit() or digits.strip(b"01234567"):  # a minus would send the loop back to this header
            raise FormatError(f"no size in the tar header of {name!r}: {digits!r}; build or fetch the shard again")
        size, start = int(digits, 8), position + BLOCK
        if start + size > len(span):
            raise FormatError(f"member {name!r} ends past the sample")
        members[name] = view[start : start + size]
        position = start + -(-size // BLOCK) * BLOCK
    return members
