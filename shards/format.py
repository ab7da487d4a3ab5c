"""Shard format, version 1: names, dtypes and the index, shared by the builder and the reader.

`docs/shard-format.md` is the specification. This file reads no file and knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import xxhash

FORMAT_VERSION = 1
BLOCK = 512  # bytes; tar headers and contents begin at multiples of it
INDEX_NAME = "index.json"
REJECTS_NAME = "rejects.jsonl"
KEY_PATTERN = re.compile(
    r"[A-Za-z0-9_-]{1,80}"
)  # no dots: webdataset splits at the first one; short: names fit the plain tar header

# One stored token. `branch` 0 is the shared trunk (BOS and visuals), annotation i is branch i + 1. `weight` is the
# loss weight of *predicting* this token. The last token of a branch (EOS) is a label only and never an input.
TOKEN_DTYPE = np.dtype([("id", "<i4"), ("branch", "<i2"), ("weight", "<f4")])


class FormatError(ValueError):
    """A shard or an index that is damaged, foreign or of another version."""


def index_dtype(num_variants: int) -> np.dtype[np.void]:
    """Row of `NNNNNN.idx.npy`: one per sample, 26 + 10 K bytes.

    offset, span: the sample's byte range in the tar (first header to last padding block); xxh64: xxh3-64 of that
    span; key_hash: `key_hash(key)`; per variant: num_crops (ViT inputs), num_frames, num_tokens (expanded input
    tokens) and loss_weight (sum of the tokens' weights).
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
            ("loss_weight", "<f4", k),
        ]
    )


def key_hash(key: str) -> int:
    """32-bit hash of a key: picks the text variant of an epoch, (epoch + hash) mod K."""
    return xxhash.xxh32_intdigest(key.encode())


def span_hash(data: bytes | memoryview) -> int:
    """xxh3-64 of a sample's bytes."""
    return xxhash.xxh3_64_intdigest(data)


def canonical_json(value: Any) -> bytes:
    """JSON bytes that depend on the value alone: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(value: Any) -> str:
    """sha256 of `canonical_json(value)`, 16 hex digits: enough to tell settings apart and short to print."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]


class ShardInfo(pydantic.BaseModel, extra="forbid", frozen=True):
    """One tar and its sidecar. `name` is the stem: `000000` for `000000.tar` and `000000.idx.npy`."""

    name: str = pydantic.Field(pattern=r"^\d{6}$")
    bytes: int
    sha256: str
    samples: int
    index_sha256: str


class Totals(pydantic.BaseModel, extra="forbid", frozen=True):
    """Sums over the dataset. `trees` counts examples, `annotations` their branches; tokens and crops: variant 0."""

    samples: int
    annotations: int
    tokens: int
    crops: int
    frames: int
    bytes: int
    rejects: int


class DatasetIndex(pydantic.BaseModel, extra="forbid", frozen=True):
    """`index.json`: written last, so its presence means that the dataset is whole.

    `processor` holds every setting that changes a token or a pixel (`processor["layout"]` is a `layout.VisualLayout`);
    `source` names the published dataset (repo, revision); `build` the options of the build, none of which the
    reader needs.
    """

    format_version: int
    dataset: str
    stage: str
    num_variants: int = pydantic.Field(ge=1, le=64)
    processor: dict[str, Any]
    source: dict[str, Any]
    build: dict[str, Any]
    totals: Totals
    shards: tuple[ShardInfo, ...]

    @property
    def processor_fingerprint(self) -> str:
        """Digest of the processor's settings."""
        return digest(self.processor)

    @property
    def digest(self) -> str:
        """What the plan depends on: the samples (through the sidecars' hashes) and the processor."""
        return digest([self.format_version, self.processor, [[s.name, s.samples, s.index_sha256] for s in self.shards]])


def parse_index(data: bytes, where: str) -> DatasetIndex:
    """Parse `index.json`.

    Raises:
        FormatError: not JSON, a field missing or unknown, or another format version.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error}); rebuild the dataset with tools/build_shards.py") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{where}: shard format version {version!r}, this code reads {FORMAT_VERSION}; "
            "rebuild the dataset with tools/build_shards.py"
        )
    try:
        return DatasetIndex.model_validate(raw)
    except pydantic.ValidationError as error:
        raise FormatError(f"{where}: {error}") from None


def check_sidecar(rows: npt.NDArray[np.void], shard: ShardInfo, num_variants: int, where: str) -> None:
    """Check a loaded sidecar against its entry in the index.

    Raises:
        FormatError: another dtype, or another number of rows.
    """
    if rows.dtype != index_dtype(num_variants):
        raise FormatError(f"{where}: sidecar dtype {rows.dtype} is not that of {num_variants} variants")
    if len(rows) != shard.samples:
        raise FormatError(f"{where}: {len(rows)} rows, index.json says {shard.samples}")


def npy_rows(data: bytes, dtype: np.dtype[Any]) -> tuple[int, int]:
    """First byte and number of the rows of a one-dimensional .npy file (format 1.0) of `dtype`.

    The header is compared, not parsed: numpy parses it with `ast`, which fails now and then in threads (CPython 3.11),
    and a header from outside is better not evaluated at all.

    Raises:
        FormatError: another kind of array, or not as many bytes as its header says.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    count, rest = divmod(len(data) - start, dtype.itemsize)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    wanted = repr(header)[:-1].encode() + b", }"
    if rest or count < 0 or data[:8] != b"\x93NUMPY\x01\x00" or data[10:start].rstrip() != wanted:
        raise FormatError(
            f"no .npy rows of {dtype.names}: {data[:start][:200]!r} and {len(data) - start} bytes of rows"
        )
    return start, count


def tar_members(span: bytes) -> dict[str, bytes]:
    """Files of a run of tar members, by name. Plain headers only, as the writer makes them.

    Raises:
        FormatError: a header of another kind, or one that points past the end.
    """
    members, position = {}, 0
    while position < len(span):
        header = span[position : position + BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        if len(header) < BLOCK or header[156:157] not in {b"0", b"\0"} or header[345:346] != b"\0":
            raise FormatError(f"no plain tar header at byte {position} of the sample")
        try:
            size = int(header[124:136].rstrip(b"\0 "), 8)
        except ValueError:
            raise FormatError(f"no size in the tar header of {name!r}") from None
        start = position + BLOCK
        if start + size > len(span):
            raise FormatError(f"member {name!r} ends past the sample")
        members[name] = span[start : start + size]
        position = start + -(-size // BLOCK) * BLOCK
    return members


def whole_headers(data: bytes) -> Iterator[tuple[int, int, str]]:
    """Begin, end and key of every member in `data` whose tar header has a right checksum, whatever else is damaged.

    The end is where the next header should lie; a member that is cut short ends with `data`.
    """
    position = 0
    while position + BLOCK <= len(data):
        try:
            member = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            position += BLOCK
            continue
        end = position + BLOCK + -(-member.size // BLOCK) * BLOCK
        yield position, min(end, len(data)), member.name.split(".", 1)[0]
        position = end
