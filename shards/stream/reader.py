"""Reading one sample: its byte range, its checksum, its members. Damage is detected and reported here, never repaired.

A sample whose bytes are wrong is read up to `ATTEMPTS` times; then the caller gets a `Damage` instead of the sample.
A storage that refuses, does not answer or is gone is an error, never a damage: no sample is masked for it.
`shards.stream.collate` decodes images and assembles packs; `shards.stream.loader` counts damaged samples against a
budget (the quarantine).
"""

from __future__ import annotations

import errno
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.format import (
    ASKED_NAME,
    INDEX_NAME,
    ODD_SAMPLE,
    TOKEN_DTYPE,
    FormatError,
    printable,
    read_rows,
    span_hash,
    stored_variant,
    tar_members,
)
from shards.layout import sample_visuals
from shards.storage.base import UnavailableError, tally
from shards.stream.dataset import Tars
from shards.stream.plan import Draw

DAMAGE_BUDGET = 0.001  # largest fraction of a dataset's samples that may be damaged; one sample may, unless it is 0
ATTEMPTS = 3  # reads of a sample before it counts as damaged
PAUSE = 0.05  # seconds before the second attempt; doubles, with jitter
JITTER = random.Random()  # used for pauses only: no data depends on it


class ReadError(ValueError):
    """Bytes are not the sample that the index describes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSample:
    """One variant of one sample as stored: tokens unexpanded, images still JPEG, numbered as in the record.

    `asked`: the member that `shards.asked` reads; None if the sample has none.
    """

    key: str
    tokens: npt.NDArray[np.void]
    visuals: list[dict[str, Any]]
    images: dict[int, memoryview]
    asked: memoryview | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A sample that could not be read, its location and the reason: an entry of the quarantine list.

    `key` is None if no tar header of the sample is intact.
    """

    dataset: str
    shard: str
    row: int
    key: str | None
    offset: int
    reason: str

    def __str__(self) -> str:
        place = f"{self.dataset}/{self.shard}.tar, sample {self.row} ({self.key}) at byte {self.offset}"
        return printable(f"{place}: {self.reason}")


def read_sample(tars: Tars, draw: Draw) -> StoredSample | Damage:
    """Read a draw as one byte range and verify it; after `ATTEMPTS` failed reads it is reported as damage.

    Raises:
        UnavailableError: the storage does not answer, refuses or is gone, so the sample may be intact.
    """
    span, reason = b"", ""
    failure: OSError | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            tally("retries")
            time.sleep(PAUSE * 2 ** (attempt - 1) * (1 + JITTER.random()))
        try:
            span = tars.read(draw.shard, draw.offset, draw.span, past_cache=attempt > 0)
            check_span(span, draw)
            tally("bytes", len(span))
            return parse_sample(span, draw.variant, has_visuals=draw.num_crops > 0)
        except (UnavailableError, PermissionError) as error:
            raise _unavailable(tars, draw, error) from None
        except OSError as error:
            reason, failure = str(error), error
        except (ReadError, FormatError) as error:
            reason, failure = str(error), None
    if failure is not None and not _is_lost_alone(tars, failure):
        raise _unavailable(tars, draw, failure) from None
    from shards.tar_headers import whole_headers

    key = next((key for _, _, key in whole_headers(span)), None)
    return to_damage(tars, draw, key, f"{reason} ({ATTEMPTS} reads)")


def _is_lost_alone(tars: Tars, error: OSError) -> bool:
    """Whether a shard is missing, or cannot be read from its disk, while the dataset's index is still there."""
    if not isinstance(error, FileNotFoundError) and error.errno != errno.EIO:
        return False
    try:
        return tars.storage.size(INDEX_NAME) is not None
    except OSError:
        return False


def _unavailable(tars: Tars, draw: Draw, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"{tars.name}/{tars.shards[draw.shard]}.tar cannot be read from {tars.storage.root}: {error}; no sample was "
        "masked. Make the storage available, then start again: the run resumes where it was"
    )


def to_damage(tars: Tars, draw: Draw, key: str | None, reason: str) -> Damage:
    """The record of a draw that cannot be used."""
    shard = tars.shards[draw.shard]
    return Damage(dataset=tars.name, shard=shard, row=draw.row, key=key, offset=draw.offset, reason=reason)


def check_span(span: bytes, draw: Draw) -> None:
    """Compare the length and the checksum of a span with the index.

    Raises:
        ReadError: the length or the checksum differs.
    """
    if len(span) != draw.span:
        raise ReadError(f"{len(span)} bytes, expected {draw.span}: the file is cut short")
    checksum = span_hash(span)
    if checksum != draw.xxh64:
        raise ReadError(f"checksum {checksum:016x}, expected {draw.xxh64:016x}")


def parse_sample(span: bytes, variant: int, *, has_visuals: bool = True) -> StoredSample:
    """Parse a verified span as a sample. Its record, with the texts of all variants, is parsed for its visuals only.

    Raises:
        FormatError: the span is not a plain tar.
        ReadError: the members have several keys, or a member is missing or does not parse.
    """
    members = tar_members(span)
    keys = {name.split(".", 1)[0] for name in members}
    if len(keys) != 1:
        raise ReadError(f"members of {len(keys)} samples where one was expected")
    key = keys.pop()
    try:
        fields = {name.split(".", 1)[1]: data for name, data in members.items()}
        tokens = read_rows(fields[f"tokens{stored_variant(fields, variant)}.npy"], TOKEN_DTYPE)
        visuals = sample_visuals(json.loads(str(fields["json"], "utf-8")), variant) if has_visuals else []
        images = {int(name[:-4]): data for name, data in fields.items() if name.endswith(".jpg")}
    except ODD_SAMPLE as error:
        raise ReadError(f"{type(error).__name__}: {error}") from None
    return StoredSample(key=key, tokens=tokens, visuals=visuals, images=images, asked=fields.get(ASKED_NAME))
