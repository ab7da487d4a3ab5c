"""Batched generation of answers for lmms-eval, with stop texts and a budget of failures.

The limits of frames, crops and the prompt's length are those of `tools/evaluate.py`, but the caller may set the maximum
number of frames. The requests of lmms-eval are read in `molmo2.eval.lmms.requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, TypeVar

from molmo2.eval.lmms.requests import Generation, cut
from molmo2.model.generate import PromptTensors, stream
from molmo2.model.molmo2 import Molmo2
from molmo2.processing.tokenizer import Tokenizer
from shards.catalog import load_catalog
from shards.schema import Limits

BUDGET: Final = 0.01  # fraction of the questions that may fail; their answers are empty, and so count as wrong

Asked = TypeVar("Asked")
Ready = TypeVar("Ready")


class Reply(NamedTuple):
    """An answer and its number of tokens."""

    text: str
    num_tokens: int


class TooManyFailuresError(ValueError):
    """More questions failed than the budget allows, so that a score would mean little."""


@dataclass(slots=True)
class Failures:
    """Questions without a prompt, among `num_questions`; a fraction above `BUDGET` ends the evaluation."""

    num_questions: int
    found: list[str] = field(default_factory=list)

    def add(self, name: str, reason: Exception) -> str:
        """Record a failure and return a line for the log.

        Raises:
            TooManyFailuresError: the failures exceed the budget.
        """
        self.found.append(f"{name}: {reason}")
        if len(self.found) > BUDGET * self.num_questions:
            latest = "\n  ".join(self.found[-5:])
            raise TooManyFailuresError(
                f"{len(self.found)} of {self.num_questions} questions cannot be asked, at most {BUDGET:.0%} may fail:"
                f"\n  {latest}"
            )
        return f"no answer, which counts as a wrong one: {self.found[-1]}"


def limits_of(max_frames: int | None) -> Limits:
    """The limits of a prompt: those of the published benchmarks' catalog, with as many images as the crops allow.

    Raises:
        ValueError: `max_frames` is less than 1.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames={max_frames}: a video needs at least one frame")
    limits = load_catalog("molmo2-eval").stages["eval"].limits
    return replace(limits, max_images=limits.max_crops // 2, max_frames=max_frames or limits.max_frames)


def replies(
    model: Molmo2, tokenizer: Tokenizer, prompts: Sequence[PromptTensors], generation: Generation
) -> list[Reply]:
    """Generate the answer to each prompt of one batch; an answer ends before its first stop text."""
    rows: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    reach = max((len(stop.encode()) for stop in generation.until), default=0)  # in tokens of a byte or more
    for tokens in stream(model, prompts, generation.max_new_tokens, tokenizer.eos, generation.sampling):
        for number, token in enumerate(tokens):
            if number in ended or token == tokenizer.eos:
                ended.add(number)
                continue
            rows[number].append(token)
            tail = tokenizer.decode(rows[number][-reach:]) if reach else ""
            if any(stop in tail for stop in generation.until):
                ended.add(number)
        if len(ended) == len(rows):
            break
    return [Reply(cut(tokenizer.decode(row), generation.until), len(row)) for row in rows]


def prepared_ahead(
    prepare: Callable[[Asked], Ready], items: Sequence[Asked], size: int
) -> Iterator[list[tuple[Asked, Ready]]]:
    """Yield batches of `size` items, each with its result of `prepare`; a thread prepares the next batch meanwhile."""
    batches = [items[first : first + size] for first in range(0, len(items), size)]

    def make(batch: Sequence[Asked]) -> list[tuple[Asked, Ready]]:
        return [(item, prepare(item)) for item in batch]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if coming is None:
                return
            ready = coming.result()
            coming = pool.submit(make, following) if following is not None else None
            yield ready
