"""A benchmark as data: which dataset of a catalog is asked, how answers are scored, what guessing is worth."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2.eval.metrics.scores import CorpusMetric, Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row of the result table; a prompt's form is the processor's, by the annotation.

    Attributes:
        name: unique among all.
        dataset: name in the catalog; its "eval" stage is asked.
        metric: scores one answer.
        chance: what a blind guess is worth; None where the metric knows.
        target: what the demo wants to reach.
        max_new_tokens: longest answer.
        corpus: scores of all answers together, reported beside the mean of `metric`.
    """

    name: str
    dataset: str
    metric: Metric
    chance: float | None = None
    target: float | None = None
    max_new_tokens: int = 12
    corpus: tuple[CorpusMetric, ...] = ()
