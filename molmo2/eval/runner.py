"""Ask a model the questions of a suite: validation rows -> examples -> prompts -> greedy answers -> scores.

Rows go through the same converters and processor as training data. Only one process and one device are used.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from molmo2.eval.benchmarks import Benchmark, Suite
from molmo2.eval.metrics import Score
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import Molmo2
from molmo2.processing import Processor, Prompt
from shards.catalog import Catalog, Row
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Annotation, Example, Limits

STAGE: Final = "eval"
BATCH_SIZE = 32
SHOWN = 8  # answers that the report shows with their picture
FRAMES_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One annotation of one example, and the rows it was made from."""

    example: Example
    number: int
    row: Mapping[str, Any]

    @property
    def asked(self) -> Annotation:
        """The annotation."""
        return self.example.annotations[self.number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A scored prediction."""

    question: Question
    prompt: Prompt
    text: str
    score: Score


def read_examples(row: Row, raw: Path, columns: Sequence[str] = ()) -> Iterator[tuple[Example, Mapping[str, Any]]]:
    """Examples of a dataset's validation split with the first row of each; `columns`: beyond the converter's.

    Raises:
        SourceError: files or columns are missing.
        RejectedError: a row that the converter refuses; validation data must be whole.
    """
    table = open_rows(row, STAGE, raw / row.folder, columns)
    for numbers in table.groups(row.group_by):
        for group in read_groups(row, STAGE, raw / row.folder, table, [numbers], columns):
            for example in convert(group):
                if isinstance(example, Example):
                    yield example, group.values[0]


def questions(row: Row, raw: Path, columns: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a dataset, all annotations of an example one after the other."""
    found: list[Question] = []
    for example, values in read_examples(row, raw, columns):
        found += [Question(example=example, number=i, row=values) for i in range(len(example.annotations))]
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def ask(
    model: Molmo2,
    processor: Processor,
    limits: Limits,
    benchmark: Benchmark,
    asked: Sequence[Question],
    device: torch.device,
) -> list[Answer]:
    """Greedy answers to all questions, scored, in the order given. Questions of like length share a batch."""
    prompts = [
        processor.prompt(question.example, limits, question.number)
        for question in tqdm(asked, desc=f"{benchmark.name}: prompts", unit="q", leave=False)
    ]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i].input_ids))
    texts = [""] * len(asked)
    batches = [order[first : first + BATCH_SIZE] for first in range(0, len(order), BATCH_SIZE)]
    for batch in tqdm(batches, desc=f"{benchmark.name}: answers", unit="batch", leave=False):
        inputs = [PromptTensors.of(prompts[i], device) for i in batch]
        rows = generate(model, inputs, benchmark.max_new_tokens, processor.tokenizer.eos)
        for i, ids in zip(batch, rows, strict=True):
            texts[i] = processor.tokenizer.decode(ids)
    return [
        Answer(question=question, prompt=prompt, text=text, score=benchmark.metric(text, question.asked, question.row))
        for question, prompt, text in zip(asked, prompts, texts, strict=True)
    ]


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


def summarize(benchmark: Benchmark, answers: Sequence[Answer]) -> dict[str, Any]:
    """Score, chance level, and the first answers, as JSON."""
    chances = [answer.score.chance for answer in answers if answer.score.chance is not None]
    chance = benchmark.chance if benchmark.chance is not None else (sum(chances) / len(chances) if chances else None)
    return {
        "name": benchmark.name,
        "dataset": benchmark.dataset,
        "metric": benchmark.metric.__name__,
        "num_questions": len(answers),
        "score": sum(answer.score.value for answer in answers) / len(answers),
        "chance": chance,
        "target": benchmark.target,
        "answers": [
            {
                "key": answer.question.example.key,
                "prompt": answer.prompt.text.removeprefix("user: "),
                "prediction": answer.text,
                "score": answer.score.value,
                "picture": picture(answer.prompt),
            }
            for answer in answers[:SHOWN]
        ],
    }


def evaluate(
    suite: Suite,
    catalog: Catalog,
    raw: Path,
    model: Molmo2,
    processor: Processor,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Run every benchmark of a suite; returns their summaries.

    Args:
        suite: the benchmarks.
        catalog: where their datasets are described; its "eval" stage gives the limits of a prompt.
        raw: directory of raw data.
        model: weights loaded; moved to `device` and set to evaluation.
        processor: of stage "eval".
        limit: questions of each benchmark, at most.
        device: CPU by default.

    Raises:
        ValueError: a dataset is missing, has no question, or has one that does not fit the limits.
    """
    device = device or torch.device("cpu")
    model = model.to(device).eval()
    limits = catalog.stages[STAGE].limits
    results = []
    for benchmark in suite.benchmarks:
        (row,) = catalog.select(STAGE, [benchmark.dataset])
        asked = questions(row, raw, benchmark.columns, limit)
        if not asked:
            raise ValueError(f"benchmark {benchmark.name}: {raw / row.name} holds no question; make the data anew")
        results.append(summarize(benchmark, ask(model, processor, limits, benchmark, asked, device)))
    return results
