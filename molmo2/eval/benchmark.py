"""A benchmark as data: its dataset in a catalog, the metric of its answers, and the score of guessing."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2.eval.metrics.scores import CorpusMetric, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row of the result table; the processor renders the prompts from the annotations.

    Attributes:
        name: unique among all benchmarks.
        dataset: name of the dataset in the catalog; its stage is "eval".
        metric: scores one answer.
        chance: expected score of a blind guess; None if the metric gives it for each question.
        target: the score that the demo should reach.
        max_new_tokens: maximum length of an answer, in tokens.
        corpus: scores of all answers together, reported besides the mean of `metric`.
    """

    name: str
    dataset: str
    metric: Metric
    chance: float | None = None
    target: float | None = None
    max_new_tokens: int = 12
    corpus: tuple[CorpusMetric, ...] = ()
