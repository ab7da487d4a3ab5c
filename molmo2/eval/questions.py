"""Questions from shards of stage "eval": samples, their annotations as questions, and batches of one sample.

Decoding and geometry are those of training (`shards.stream.collate`), so a model gets the pixels on which it would be
trained. `molmo2.eval.runner` generates the answers and scores them.
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
from shards.stream.collate import Batch, collate, decode_crops, make_pixels, open_sample
from shards.stream.dataset import Dataset, Tars
from shards.stream.plan import Cursor, Draw, PackSpec, draws_of
from shards.stream.reader import Damage, StoredSample, read_sample

AHEAD: Final = 16  # samples that are read in parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One annotation of one sample. `asked`: the annotation; `draw`: the sample's location."""

    key: str
    number: int
    asked: Annotation
    draw: Draw

    @property
    def name(self) -> str:
        """A name that is unique in the dataset."""
        return f"{self.key}#{self.number}"


def first_draws(dataset: Dataset, limit: int | None = None) -> list[Draw]:
    """The first `limit` samples of a dataset, in the order of its shards."""
    return draws_of(dataset, np.arange(len(dataset))[:limit])


def read_samples(tars: Tars, draws: Sequence[Draw]) -> Iterator[tuple[Draw, StoredSample]]:
    """Read samples, `AHEAD` of them in parallel.

    Raises:
        ValueError: a sample is damaged; a score needs all of them.
    """
    for first in range(0, len(draws), AHEAD):
        part = draws[first : first + AHEAD]
        for draw, stored in zip(part, read_threads().map(lambda draw: read_sample(tars, draw), part), strict=True):
            if isinstance(stored, Damage):
                raise ValueError(f"{stored}; run tools/verify_shards.py --repair, or build the dataset again")
            yield draw, stored


def questions_of(draw: Draw, stored: StoredSample) -> list[Question]:
    """A question for every annotation of a sample.

    Raises:
        ValueError: the shards are of another stage or of an older version.
    """
    if stored.asked is None:
        raise ValueError(f"sample {stored.key} has no stored questions; build it with --stage eval --overwrite")
    annotations = read_asked(stored.asked)
    return [Question(key=stored.key, number=i, asked=asked, draw=draw) for i, asked in enumerate(annotations)]


def as_batch(layout: VisualLayout, draw: Draw, stored: StoredSample) -> Batch:
    """A batch of this sample alone, as the loader would make it.

    Raises:
        ReadError: the sample does not agree with the index.
    """
    opened = open_sample(layout, draw, stored)
    pixels = make_pixels(layout, sum(opened.num_crops))
    decode_crops(layout, stored, range(len(stored.visuals)), pixels)
    return collate(layout, [PackSpec(0, 0, (draw,))], [opened], pixels, draw.num_tokens, 1.0, Cursor())
