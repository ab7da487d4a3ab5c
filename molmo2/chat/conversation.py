"""A conversation with a model about images or a video, for the terminal and the web page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from molmo2.model.generate import PromptTensors, Sampling, stream
from molmo2.model.molmo2 import Molmo2
from molmo2.processing.processor import Processor
from shards.schema import Chat, Example, ImageRef, Limits, Source, Turn, VideoRef

LIMITS = Limits(sequence_length=16384, max_crops=384, max_frames=384, max_images=16, image_crops=8)


def conversation(turns: Sequence[Turn], images: Sequence[Path], video: Path | None) -> Example:
    """The turns so far about the media, as an example; the last turn must be a question."""
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
    """Generate the answer to the last question and yield it in pieces of text, one after each token.

    A piece is empty while a character is incomplete, so that the caller can stop after any token.

    Raises:
        RejectedError: media are unreadable, or the conversation is too long.
    """
    device = next(model.parameters()).device
    prompt = PromptTensors.of(processor.prompt(example, LIMITS), device)
    tokenizer = processor.tokenizer
    ids: list[int] = []
    shown = ""  # the text that has been yielded
    for (token,) in stream(model, [prompt], max_new_tokens, tokenizer.eos, sampling):
        if token != tokenizer.eos:
            ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the last character is incomplete
            text = shown
        yield text[len(shown) :]
        shown = text
    yield tokenizer.decode(ids)[len(shown) :]
