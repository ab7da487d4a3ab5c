"""Questions from shards of stage "eval": a sample, its annotations, and prompts that end where an answer begins.

Decoding and geometry are those of training (`shards.stream.collate`), so a model is asked about the pixels that it
would be trained on. Who answers, and what an answer is worth, is the work of `molmo2.eval.runner`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shards.asked import read_asked
from shards.layout import VisualLayout
from shards.schema import Annotation
from shards.storage.base import read_threads
from shards.stream.collate import Batch, collate, decode_crops, open_sample
from shards.stream.dataset import Dataset, Tars
from shards.stream.plan import Cursor, Draw, PackSpec
from shards.stream.reader import Damage, StoredSample, read_sample

AHEAD: Final = 16  # samples that are read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One annotation of one sample; `draw` says where the sample lies."""

    key: str
    number: int
    asked: Annotation
    draw: Draw

    @property
    def name(self) -> str:
        """Unique in its dataset."""
        return f"{self.key}#{self.number}"


def draws_of(dataset: Dataset, limit: int | None = None) -> list[Draw]:
    """The first `limit` samples of a dataset, in the order of its shards."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    shards, numbers, rows = dataset.lookup(np.arange(count))
    return [
        Draw(
            dataset=0,
            shard=int(shard),
            row=int(number),
            variant=0,
            offset=int(row["offset"]),
            span=int(row["span"]),
            xxh64=int(row["xxh64"]),
            num_tokens=int(row["num_tokens"][0]),
            num_crops=int(row["num_crops"][0]),
            loss_weight=float(row["loss_weight"][0]),
        )
        for shard, number, row in zip(shards, numbers, rows, strict=True)
    ]


def read_samples(tars: Tars, draws: Sequence[Draw]) -> Iterator[tuple[Draw, StoredSample]]:
    """These samples, a few read at once.

    Raises:
        ValueError: one is damaged: a score needs all of them.
    """
    for first in range(0, len(draws), AHEAD):
        some = draws[first : first + AHEAD]
        for draw, stored in zip(some, read_threads().map(lambda draw: read_sample(tars, draw), some), strict=True):
            if isinstance(stored, Damage):
                raise ValueError(f"{stored}; run tools/verify_shards.py --repair, or build the dataset again")
            yield draw, stored


def questions_of(draw: Draw, stored: StoredSample) -> list[Question]:
    """A question for every branch.

    Raises:
        ValueError: shards of another stage, or of an older version.
    """
    if stored.asked is None:
        raise ValueError(f"sample {stored.key} says nothing of its questions; build it with --stage eval --overwrite")
    asked = read_asked(stored.asked)
    return [Question(key=stored.key, number=i, asked=one, draw=draw) for i, one in enumerate(asked)]


def as_batch(layout: VisualLayout, draw: Draw, stored: StoredSample) -> Batch:
    """A batch of this sample alone, as the loader would make it.

    Raises:
        ReadError: the sample is not what the index says.
    """
    opened = open_sample(layout, draw, stored)
    crops = decode_crops(layout, stored, range(len(stored.visuals)))
    return collate(layout, [PackSpec(0, 0, (draw,))], [opened], crops, draw.num_tokens, 1.0, Cursor())
