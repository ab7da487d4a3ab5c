"""A conversation with a model about images or a video: what the terminal and the web page share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from molmo2.model.generate import PromptTensors, Sampling, stream
from molmo2.model.molmo2 import Molmo2
from molmo2.processing.processor import Processor
from shards.schema import Chat, Example, ImageRef, Limits, Source, Turn, VideoRef

LIMITS = Limits(sequence_length=16384, max_crops=384, max_frames=384, max_images=16, image_crops=8)


def conversation(turns: Sequence[Turn], images: Sequence[Path], video: Path | None) -> Example:
    """What has been said about the media, the last turn being a question."""
    return Example(
        key="chat",
        dataset="chat",
        source=Source(file="", row=0),
        annotations=(Chat(style="user_qa", turns=tuple(turns)),),
        images=tuple(ImageRef(path=str(path)) for path in images),
        video=None if video is None else VideoRef(path=str(video)),
    )


def answer(
    model: Molmo2, processor: Processor, example: Example, sampling: Sampling, max_new_tokens: int
) -> Iterator[str]:
    """The answer to the last question, piece by piece.

    Raises:
        RejectedError: unreadable media, or a conversation that has become too long.
    """
    device = next(model.parameters()).device
    prompt = PromptTensors.of(processor.prompt(example, LIMITS), device)
    tokenizer = processor.tokenizer
    ids: list[int] = []
    said = ""
    for (token,) in stream(model, [prompt], max_new_tokens, tokenizer.eos, sampling):
        if token != tokenizer.eos:
            ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: its other bytes are yet to come
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(ids)[len(said) :]
