"""Run the benchmarks of a suite: samples of stage "eval" -> prompts -> greedy answers -> scores.

The samples are divided among the ranks. Ranks exchange answers only through files (`answers`), not through collectives,
so a killed run resumes with any number of ranks. `questions` reads the samples.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from molmo2.eval.answers import Line, Store
from molmo2.eval.benchmarks import BATCH_SIZE, STAGE, Benchmark, Suite, is_built
from molmo2.eval.metrics.scores import Answered, Score
from molmo2.eval.questions import Question, as_batch, first_draws, questions_of, read_samples
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import PRECISIONS, Molmo2
from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.processor import Processor
from shards.format import REJECTS_NAME
from shards.schema import Annotation, Chat, Choice, Points, Text, Tracks
from shards.stream.collate import Batch
from shards.stream.dataset import Dataset, Tars, check_processor, open_dataset
from shards.stream.plan import Draw
from shards.stream.reader import StoredSample

CHUNK: Final = 4  # batches whose samples are in memory at once, sorted by length so that a batch has like lengths
SHOWN = 8  # number of first answers, and of worst answers, that the reports show with their picture
FRAMES_SHOWN = 6  # frames of a video that a picture shows
REASONS_SHOWN = 3  # number of reasons for rows that were left out in a report


class NotBuiltError(ValueError):
    """A dataset has no finished shards of stage "eval"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The model's answer to a question, with its score."""

    question: Question
    text: str
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that divide the samples; `wait` is a barrier of all of them."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


ALONE: Final = Ranks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model under evaluation: on `device`, in evaluation mode, with a processor of stage "eval"."""

    model: Molmo2
    processor: Processor
    device: torch.device
    batch_size: int = BATCH_SIZE

    @property
    def precision(self) -> str:
        """The model's key in `PRECISIONS`."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.model.lm_head.weight.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Summaries of the benchmarks that ran (only on rank 0), and by name the reasons why others were skipped."""

    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def ask(subject: Subject, benchmark: Benchmark, tars: Tars, draws: Sequence[Draw], known: Set[str]) -> Iterator[Line]:
    """Generate greedy answers to the questions of these samples, except those in `known`.

    Questions of similar length are in a batch.

    Raises:
        ValueError: a question has no answer in the data, so that there is no prompt.
    """
    size, tokenizer, layout = subject.batch_size, subject.processor.tokenizer, subject.processor.layout

    def answered(batch: Sequence[tuple[Question, StoredSample]]) -> Iterator[Line]:
        prompts = [prompt_of(as_batch(layout, question.draw, stored), question.number) for question, stored in batch]
        inputs = [_on(prompt[0], subject.device) for prompt in prompts if prompt is not None]
        if len(inputs) < len(batch):
            names = [question.name for (question, _), prompt in zip(batch, prompts, strict=True) if prompt is None]
            raise ValueError(f"{benchmark.dataset}: {names[0]} has no answer with a loss, so there is no prompt")
        rows = generate(subject.model, inputs, benchmark.max_new_tokens, tokenizer.eos)
        for (question, _), ids in zip(batch, rows, strict=True):
            yield Line(question.name, tokenizer.decode(ids))

    waiting: list[tuple[Question, StoredSample]] = []
    with tqdm(total=len(draws), desc=benchmark.name, unit="sample", leave=False) as bar:
        for draw, stored in read_samples(tars, draws):
            waiting += [(question, stored) for question in questions_of(draw, stored) if question.name not in known]
            bar.update()
            if len(waiting) >= size * CHUNK or draw is draws[-1]:
                waiting.sort(key=lambda pair: pair[0].draw.num_tokens)
                for first in range(0, len(waiting), size):
                    yield from answered(waiting[first : first + size])
                waiting = []


def _on(prompt: PromptTensors, device: torch.device) -> PromptTensors:
    return PromptTensors(**{item.name: getattr(prompt, item.name).to(device) for item in fields(prompt)})


def picture_of_sample(batch: Batch, visuals: Sequence[Mapping[str, Any]]) -> str | None:
    """The model's visual input as a data URI: the first crop, or some frames side by side; None for text."""
    if not visuals:
        return None
    pixels = batch.pixels.numpy()
    frames = pixels[:1]
    if visuals[0]["kind"] == "frame":
        chosen = np.unique(np.linspace(0, len(pixels) - 1, FRAMES_SHOWN).round().astype(int))
        frames = pixels[chosen]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wanted(asked: Annotation) -> str:
    """The annotation's own answer, readable."""
    match asked:
        case Choice():
            return asked.options[asked.answer]
        case Points():
            return f"{asked.count} of {asked.label}"
        case Tracks():
            return f"tracks of {asked.label}"
        case Chat():
            return asked.turns[-1].text
        case Text():
            return asked.answer


def shown(subject: Subject, tars: Tars, answer: Answer) -> dict[str, Any]:
    """An answer for the reports, with its prompt and picture; it reads the sample again."""
    question, processor = answer.question, subject.processor
    ((_, stored),) = read_samples(tars, [question.draw])
    batch = as_batch(processor.layout, question.draw, stored)
    prompt = prompt_of(batch, question.number)
    ids = [] if prompt is None else prompt[0].input_ids.tolist()
    text = processor.tokenizer.decode([token for token in ids if token < processor.tokenizer.base_vocab])
    return {
        "key": question.key,
        "prompt": text,
        "wanted": wanted(question.asked),
        "prediction": answer.text,
        "score": answer.score.value,
        "picture": picture_of_sample(batch, stored.visuals),
    }


def summarize_answers(benchmark: Benchmark, answers: Sequence[Answer], show: Callable[[Answer], Any]) -> dict[str, Any]:
    """Scores, chance level, the first answers and the worst, as JSON; `show` converts an answer for it (`shown`)."""
    chances = [answer.score.chance for answer in answers if answer.score.chance is not None]
    chance = benchmark.chance if benchmark.chance is not None else (sum(chances) / len(chances) if chances else None)
    whole = [Answered(answer.text, answer.question.asked, answer.question.asked.facts) for answer in answers]
    worst = sorted((answer for answer in answers if answer.score.value < 1), key=lambda answer: answer.score.value)
    return {
        "name": benchmark.name,
        "dataset": benchmark.dataset,
        "metric": benchmark.metric.__name__,
        "num_questions": len(answers),
        "score": sum(answer.score.value for answer in answers) / len(answers),
        "corpus": {metric.__name__: metric(whole) for metric in benchmark.corpus},
        "chance": chance,
        "target": benchmark.target,
        "answers": [show(answer) for answer in answers[:SHOWN]],
        "worst": [show(answer) for answer in worst[:SHOWN]],
    }


def run_benchmark(
    benchmark: Benchmark, tars: Tars, draws: Sequence[Draw], subject: Subject, store: Store, ranks: Ranks
) -> dict[str, Any] | None:
    """Generate the missing answers and summarize all; the result is None on other ranks than 0.

    Raises:
        ValueError: answers are missing after all ranks have finished, or a question cannot be scored.
    """
    known = store.read()
    with store.writer(ranks.rank) as write:
        for line in ask(subject, benchmark, tars, draws[ranks.rank :: ranks.world], known.keys()):
            write(line)
    ranks.wait()
    if ranks.rank:
        return None
    questions = [question for draw, stored in read_samples(tars, draws) for question in questions_of(draw, stored)]
    answers = [
        Answer(question=question, text=text, score=benchmark.metric(text, question.asked, question.asked.facts))
        for question, text in zip(questions, store.take([question.name for question in questions]), strict=True)
    ]
    return summarize_answers(benchmark, answers, functools.partial(shown, subject, tars))


def open_built(name: str, shards: str, catalog: str, subject: Subject) -> Dataset:
    """Open a dataset of stage "eval".

    Raises:
        NotBuiltError: it has not been built; the message has the command that builds it.
        DatasetError: it was built for another model or tokenizer.
    """
    root = f"{shards.rstrip('/')}/{STAGE}"
    if not is_built(shards, name):
        command = f"python tools/build_shards.py --catalog {catalog} --stage {STAGE} --datasets {name}"
        raise NotBuiltError(f"{root}/{name} is not built:\n  {command}")
    dataset = open_dataset(root, name)
    check_processor(dataset, subject.processor.settings)
    return dataset


def left_out(dataset: Dataset) -> dict[str, Any]:
    """The number of rows or examples that the build left out, and the commonest reasons."""
    rejects = dataset.storage.read(REJECTS_NAME).splitlines() if dataset.index.totals.rejects else []
    reasons = Counter(json.loads(line)["reason"] for line in rejects)
    return {"num_left_out": len(rejects), "left_out": dict(reasons.most_common(REASONS_SHOWN))}


def run_suite(
    suite: Suite,
    shards: str,
    subject: Subject,
    answers: Path,
    checkpoint: str,
    *,
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run every benchmark of a suite whose data have been built; all ranks must call it.

    Args:
        suite: the benchmarks.
        shards: folder or URL of the shards of all stages.
        subject: the model under evaluation.
        answers: folder of the answers, the same for all ranks.
        checkpoint: digest of the weights; answers of other weights, data or settings are not used.
        limit: maximum number of samples of each benchmark.
        ranks: this process among those that divide the samples.

    Raises:
        ValueError: shards are damaged or of another processor.
    """
    outcome = Outcome()
    for benchmark in suite.benchmarks:
        try:
            dataset = open_built(benchmark.dataset, shards, suite.catalog, subject)
        except NotBuiltError as error:
            outcome.skipped[benchmark.name] = str(error)
            continue
        settings = {
            "checkpoint": checkpoint,
            "precision": subject.precision,
            "data": dataset.index.digest,
            "max_new_tokens": benchmark.max_new_tokens,
        }
        store, draws = Store.of(answers, benchmark.name, settings), first_draws(dataset, limit)
        result = run_benchmark(benchmark, dataset.tars, draws, subject, store, ranks)
        if result:
            outcome.results.append({**result, **left_out(dataset)})
    return outcome
