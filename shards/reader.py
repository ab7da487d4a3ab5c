"""Reading one sample: a byte range, its checksum, its members. Damage is found here, named, and never repaired.

A sample whose bytes are wrong is read again, a few times; then the caller gets a `Damage` instead. Decoding images
and putting packs together is `shards.collate`'s work; counting damages against a budget is `shards.loader`'s.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.dataset import Dataset
from shards.format import TOKEN_DTYPE, FormatError, span_hash, tar_members
from shards.layout import VisualLayout, expanded_length, sample_visuals, visual_crops
from shards.plan import Draw

ATTEMPTS = 3
PAUSE = 0.05  # seconds before the second attempt; doubles, with jitter


class ReadError(ValueError):
    """Bytes that are not the sample they should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One variant of one sample as stored: tokens unexpanded, images still JPEG, numbered as in the record."""

    key: str
    tokens: npt.NDArray[np.void]
    visuals: list[dict[str, Any]]
    images: dict[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A sample that could not be read, and where it lies: what the quarantine list records."""

    dataset: str
    shard: str
    row: int
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.shard}.tar, sample {self.row} at byte {self.offset}: {self.reason}"


def read_sample(datasets: Sequence[Dataset], layout: VisualLayout, draw: Draw) -> StoredSample | Damage:
    """Read a draw, verified. Wrong bytes are read again before they count as damage."""
    dataset = datasets[draw.dataset]
    shard = dataset.index.shards[draw.shard].name
    entry = dataset.sidecars[draw.shard][draw.row]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1) * (1 + random.random()))  # jitter alone: no data order hangs on it
        try:
            span = dataset.storage.read(f"{shard}.tar", int(entry["offset"]), int(entry["span"]))
            check_span(span, entry)
            return parse_sample(span, draw.variant, _agrees(layout, draw))
        except (ReadError, FormatError, OSError) as error:
            reason = str(error)
    return Damage(
        dataset=dataset.name,
        shard=shard,
        row=draw.row,
        offset=int(entry["offset"]),
        reason=f"{reason} ({ATTEMPTS} reads)",
    )


def check_span(span: bytes, entry: npt.NDArray[np.void]) -> None:
    """Compare a span with its row of the sidecar.

    Raises:
        ReadError: fewer bytes, or other ones.
    """
    if len(span) != entry["span"]:
        raise ReadError(f"{len(span)} bytes, expected {entry['span']}: the file is cut short")
    found = span_hash(span)
    if found != entry["xxh64"]:
        raise ReadError(f"checksum {found:016x}, expected {int(entry['xxh64']):016x}")


def parse_sample(
    span: bytes, variant: int, check: Callable[[npt.NDArray[np.void], list[dict[str, Any]]], None] | None = None
) -> StoredSample:
    """The members of a verified span as a sample; `check` may compare lengths and raise `ReadError`.

    Raises:
        ReadError: members of several keys, a member missing, or a member that does not parse.
    """
    members = tar_members(span)
    keys = {name.split(".", 1)[0] for name in members}
    if len(keys) != 1:
        raise ReadError(f"members of {len(keys)} samples where one was expected")
    key = keys.pop()
    fields = {name.split(".", 1)[1]: data for name, data in members.items()}
    try:
        record = json.loads(fields["json"])
        tokens = np.lib.format.read_array(io.BytesIO(fields[f"tokens{variant}.npy"]), allow_pickle=False)
        visuals = sample_visuals(record, variant)
        images = {int(name[:-4]): data for name, data in fields.items() if name.endswith(".jpg")}
    except (KeyError, IndexError, ValueError) as error:
        raise ReadError(f"sample {key}: {type(error).__name__}: {error}") from None
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise ReadError(f"sample {key}: tokens of dtype {tokens.dtype} and {tokens.ndim} dimensions")
    if check is not None:
        check(tokens, visuals)
    return StoredSample(key=key, tokens=tokens, visuals=visuals, images=images)


def _agrees(layout: VisualLayout, draw: Draw) -> Callable[[npt.NDArray[np.void], list[dict[str, Any]]], None]:
    """Lengths in the sample must be those that the plan packed by."""

    def check(tokens: npt.NDArray[np.void], visuals: list[dict[str, Any]]) -> None:
        length = expanded_length(layout, tokens, visuals)
        crops = sum(visual_crops(visual) for visual in visuals)
        if (length, crops) != (draw.num_tokens, draw.num_crops):
            raise ReadError(
                f"{length} tokens and {crops} crops, the index says {draw.num_tokens} and {draw.num_crops}; "
                "rebuild the sidecar or the dataset"
            )

    return check
