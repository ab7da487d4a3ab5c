"""Questions from shards of stage "eval": a sample, its annotations, and prompts that end where an answer begins.

Decoding and geometry are those of training (`shards.collate`), so a model is asked about the pixels that it would be
trained on. Who answers, and what an answer is worth, is the runner's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from molmo2.model.generate import PromptTensors
from molmo2.model.mask import TRUNK
from shards.asked import read_asked
from shards.collate import Batch, collate, decode_crops, open_sample
from shards.dataset import Dataset, Tars
from shards.layout import VisualLayout
from shards.plan import Cursor, Draw, PackSpec
from shards.reader import Damage, StoredSample, read_sample
from shards.schema import Annotation
from shards.storage import read_threads

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


def prompt_of(batch: Batch, number: int | None = None) -> tuple[PromptTensors, Tensor] | None:
    """The trunk and a branch of a batch of one sample up to its answer, and the answer's tokens int64 [n].

    `number` counts annotations from 0; None takes the first branch. None is returned where nothing is answered.
    """
    segments = batch.segment_ids[0]
    branches = segments[segments < TRUNK]
    if number is not None:
        own = (segments == TRUNK) | (segments == number + 1)
    else:
        own = (segments == TRUNK) | (segments == branches.min()) if len(branches) else segments == TRUNK
    places = (batch.loss_weights[0][own] > 0).nonzero().flatten()
    if not len(places):
        return None
    first = int(places[0])
    answer = places[places - torch.arange(len(places), device=places.device) == first]  # of the first turn alone
    prompt = PromptTensors(
        input_ids=batch.input_ids[0][own][: first + 1],
        is_visual=batch.is_visual[0][own][: first + 1],
        pixels=batch.pixels,
        pooling=batch.pooling,
    )
    return prompt, batch.labels[0][own][answer]
