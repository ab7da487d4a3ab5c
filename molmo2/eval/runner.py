"""Ask a model the questions of a suite: validation rows -> examples -> prompts -> greedy answers -> scores.

Rows go through the same converters and processor as training data. Ranks share the questions and meet in the folder of
answers (`answers`), never on the wire, so that a killed run goes on with any number of them.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from molmo2.eval.answers import Line, Store
from molmo2.eval.benchmark import Benchmark
from molmo2.eval.benchmarks import Suite
from molmo2.eval.metrics import Answered, Score
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import Molmo2
from molmo2.processing import Processor, Prompt
from shards.catalog import Catalog, CatalogError, Row
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Annotation, Chat, Choice, Example, Limits, Points, Text, Tracks
from shards.sources.parquet import MissingSourceError
from shards.sources.paths import at

STAGE: Final = "eval"
BATCH_SIZE: Final = 32
CHUNK: Final = 4  # batches whose prompts are in memory at once; the longer ones of a chunk share a batch
SHOWN = 8  # answers that the reports show with their picture, the first and the worst
FRAMES_SHOWN = 6
REASONS_SHOWN = 3  # of rows that were left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One annotation of one example, and the rows it was made from."""

    example: Example
    number: int
    row: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Unique in its dataset."""
        return f"{self.example.key}#{self.number}"

    @property
    def asked(self) -> Annotation:
        """The annotation."""
        return self.example.annotations[self.number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A scored prediction."""

    question: Question
    text: str
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that share the questions; `wait` returns when all have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


ALONE: Final = Ranks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Who is asked. `processor` is of stage "eval", the model on `device` and in evaluation."""

    model: Molmo2
    processor: Processor
    device: torch.device
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Summaries of the benchmarks that were asked (empty but on rank 0), and why others were not, by name."""

    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def read_examples(
    row: Row, raw: Path, columns: Sequence[str] = (), left_out: list[str] | None = None
) -> Iterator[tuple[Example, Mapping[str, Any]]]:
    """Examples of a dataset's validation split with their row; `columns`: beyond the converter's.

    Reasons of the rows that the catalog or the converter leaves out are appended to `left_out`.

    Raises:
        SourceError: files or columns are missing.
        RejectedError: a row that the converter refuses; validation data must be whole.
        ValueError: columns are wanted, and an example was made of several rows.
    """
    table = open_rows(row, STAGE, raw / row.folder, columns)
    for numbers in table.groups(row.group_by):
        if columns and len(numbers) > 1:
            raise ValueError(
                f"{row.name}: {len(numbers)} rows make one example, and its metric needs {', '.join(columns)} of one; "
                "take `group_by` from the catalog row"
            )
        for group in read_groups(row, STAGE, raw / row.folder, table, [numbers], columns):
            for example in convert(group):
                if isinstance(example, Example):
                    yield example, group.values[0]
                elif left_out is not None:
                    left_out.append(example.reason)


def questions(
    row: Row, raw: Path, columns: Mapping[str, str], limit: int | None = None, left_out: list[str] | None = None
) -> list[Question]:
    """The first `limit` questions of a dataset, all annotations of an example one after the other.

    `columns`: field of a question's row -> column of the source; `left_out` as in `read_examples`.
    """
    found: list[Question] = []
    for example, values in read_examples(row, raw, list(columns.values()), left_out):
        fields = {name: at(values, column) for name, column in columns.items()}
        found += [Question(example=example, number=i, row=fields) for i in range(len(example.annotations))]
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def ask(subject: Subject, limits: Limits, benchmark: Benchmark, asked: Sequence[Question]) -> Iterator[Line]:
    """Greedy answers to all questions. Of a few batches at a time, questions of like length share a batch."""
    size = subject.batch_size
    with tqdm(total=len(asked), desc=benchmark.name, unit="q", leave=False) as bar:
        for first in range(0, len(asked), size * CHUNK):
            chunk = asked[first : first + size * CHUNK]
            prompts = [subject.processor.prompt(one.example, limits, one.number) for one in chunk]
            order = sorted(range(len(chunk)), key=lambda i: len(prompts[i].input_ids))
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                inputs = [PromptTensors.of(prompts[i], subject.device) for i in batch]
                tokenizer = subject.processor.tokenizer
                rows = generate(subject.model, inputs, benchmark.max_new_tokens, tokenizer.eos)
                for i, ids in zip(batch, rows, strict=True):
                    yield Line(chunk[i].name, tokenizer.decode(ids))
                bar.update(len(batch))


def picture(prompt: Prompt) -> str | None:
    """What the model saw, as a data URI: the first crop, or some frames side by side; None for text."""
    if not len(prompt.pixels):
        return None
    frames = prompt.pixels[:1]
    if prompt.visuals[0]["kind"] == "frame":
        chosen = np.unique(np.linspace(0, len(prompt.pixels) - 1, FRAMES_SHOWN).round().astype(int))
        frames = prompt.pixels[chosen]
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


def summarize(benchmark: Benchmark, answers: Sequence[Answer], show: Callable[[Question], Prompt]) -> dict[str, Any]:
    """Scores, chance level, the first answers and the worst, as JSON; `show` makes the prompt of a question."""

    def shown(answer: Answer) -> dict[str, Any]:
        prompt = show(answer.question)
        return {
            "key": answer.question.example.key,
            "prompt": prompt.text.removeprefix("user: "),
            "wanted": wanted(answer.question.asked),
            "prediction": answer.text,
            "score": answer.score.value,
            "picture": picture(prompt),
        }

    chances = [answer.score.chance for answer in answers if answer.score.chance is not None]
    chance = benchmark.chance if benchmark.chance is not None else (sum(chances) / len(chances) if chances else None)
    whole = [Answered(answer.text, answer.question.asked, answer.question.row) for answer in answers]
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
        "answers": [shown(answer) for answer in answers[:SHOWN]],
        "worst": [shown(answer) for answer in worst[:SHOWN]],
    }


def run_benchmark(
    benchmark: Benchmark, asked: Sequence[Question], subject: Subject, limits: Limits, store: Store, ranks: Ranks
) -> dict[str, Any] | None:
    """Ask what has no answer yet, and sum up; None but on rank 0.

    Raises:
        ValueError: answers are missing after all ranks have answered, or a question cannot be scored.
    """
    known = store.read()
    own = [question for question in asked[ranks.rank :: ranks.world] if question.name not in known]
    with store.writer(ranks.rank) as write:
        for line in ask(subject, limits, benchmark, own):
            write(line)
    ranks.wait()
    if ranks.rank:
        return None
    answers = [
        Answer(question=question, text=text, score=benchmark.metric(text, question.asked, question.row))
        for question, text in zip(asked, store.take([question.name for question in asked]), strict=True)
    ]
    return summarize(benchmark, answers, lambda one: subject.processor.prompt(one.example, limits, one.number))


def evaluate(
    suite: Suite,
    catalog: Catalog,
    raw: Path,
    subject: Subject,
    answers: Path,
    checkpoint: str,
    *,
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run every benchmark of a suite whose data are there; all ranks together.

    Args:
        suite: the benchmarks.
        catalog: where their datasets are described; its "eval" stage gives the limits of a prompt.
        raw: directory of raw data.
        subject: who is asked.
        answers: folder of the answers, the same for all ranks.
        checkpoint: digest of the weights; other weights or settings ask anew.
        limit: questions of each benchmark, at most.
        ranks: who shares the questions.

    Raises:
        ValueError: a dataset has no question, or has one that does not fit the limits.
    """
    limits = catalog.stages[STAGE].limits
    outcome = Outcome()
    for benchmark in suite.benchmarks:
        try:
            (row,) = catalog.select(STAGE, [benchmark.dataset])
        except CatalogError:
            outcome.skipped[benchmark.name] = f"the catalog has no evaluation row {benchmark.dataset!r}"
            continue
        try:
            left_out: list[str] = []
            asked = questions(row, raw, benchmark.columns, limit, left_out)
        except MissingSourceError as error:
            outcome.skipped[benchmark.name] = f"{error}\n  {catalog.how_to_get(row)}"
            continue
        if not asked:
            raise ValueError(f"benchmark {benchmark.name}: {raw / row.name} holds no question; make the data anew")
        settings = {
            "checkpoint": checkpoint,
            "processor": subject.processor.settings,
            "row": row.build_settings(),
            "limits": asdict(limits),
            "max_new_tokens": benchmark.max_new_tokens,
        }
        result = run_benchmark(benchmark, asked, subject, limits, Store.of(answers, benchmark.name, settings), ranks)
        if result:
            reasons = dict(Counter(left_out).most_common(REASONS_SHOWN))
            outcome.results.append({**result, "num_left_out": len(left_out), "left_out": reasons})
    return outcome
