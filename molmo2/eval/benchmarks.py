"""Benchmarks as data: which dataset of a catalog is asked, how answers are scored, what guessing is worth."""

from __future__ import annotations

from dataclasses import dataclass

from molmo2.eval.metrics import Metric, count_exact, exact_match, points_in_boxes


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One row of the result table.

    Attributes:
        name: unique in the suite.
        dataset: name in the catalog; its "eval" stage is asked.
        metric: scores one answer.
        chance: what a blind guess is worth; None where the metric knows.
        target: what the demo wants to reach.
        max_new_tokens: longest answer.
        columns: columns of the source that the metric needs beyond the converter's.
    """

    name: str
    dataset: str
    metric: Metric
    chance: float | None = None
    target: float | None = None
    max_new_tokens: int = 12
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Suite:
    """Benchmarks over one catalog."""

    catalog: str
    benchmarks: tuple[Benchmark, ...]


SUITES = {
    "demo": Suite(
        "demo",
        (
            Benchmark(name="image QA", dataset="demo-image-qa", metric=exact_match, chance=0.1, target=0.85),
            Benchmark(
                name="counting",
                dataset="demo-count",
                metric=count_exact,
                chance=1 / 6,  # one to six digits, each number as likely
                target=0.6,
                max_new_tokens=112,
            ),
            Benchmark(
                name="pointing at all",  # in the answers that count one to six digits
                dataset="demo-count",
                metric=points_in_boxes,
                max_new_tokens=112,
                columns=("boxes",),
            ),
            Benchmark(
                name="pointing",  # at the one digit, of up to three, that the question names
                dataset="demo-points",
                metric=points_in_boxes,
                target=0.6,
                max_new_tokens=80,
                columns=("boxes",),
            ),
            Benchmark(
                name="video QA",
                dataset="demo-video-qa",
                metric=exact_match,
                chance=(1 / 10 + 1 / 4) / 2,  # which digit, and in which of four directions it moves
                target=0.7,
            ),
        ),
    )
}
