"""A benchmark as data: which dataset of a catalog is asked, how answers are scored, what guessing is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from molmo2.eval.metrics import CorpusMetric, Metric


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
        columns: field of the row that the metric reads -> column of the source; a benchmark that has some needs a
            row of the source for each example.
        corpus: scores of all answers together, reported beside the mean of `metric`.
    """

    name: str
    dataset: str
    metric: Metric
    chance: float | None = None
    target: float | None = None
    max_new_tokens: int = 12
    columns: Mapping[str, str] = field(default_factory=dict)
    corpus: tuple[CorpusMetric, ...] = ()
