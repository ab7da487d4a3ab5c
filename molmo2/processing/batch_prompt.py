"""Extract the prompt from a batch of one stored sample: the model's inputs before the sample's answer."""

from __future__ import annotations

import torch
from torch import Tensor

from molmo2.model.generate import PromptTensors
from molmo2.model.mask import TRUNK
from shards.stream.collate import Batch


def prompt_of(batch: Batch, number: int | None = None) -> tuple[PromptTensors, Tensor] | None:
    """The trunk and one branch of a one-sample batch up to the branch's answer, and the answer's tokens int64 [n].

    `number` is the annotation's number from 0; None takes the first branch. The result is None if there is no answer.
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
    answer = places[places - torch.arange(len(places), device=places.device) == first]  # the first turn only
    prompt = PromptTensors(
        input_ids=batch.input_ids[0][own][: first + 1],
        is_visual=batch.is_visual[0][own][: first + 1],
        pixels=batch.pixels,
        pooling=batch.pooling,
    )
    return prompt, batch.labels[0][own][answer]
