"""The suites of benchmarks, and the selection of some by name. `published` has the benchmarks of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

from molmo2.eval.benchmark import Benchmark
from molmo2.eval.metrics.scores import count_exact, exact_match, points_in_boxes
from molmo2.eval.published import IMAGE, MULTI_IMAGE, POINTING, TRACKING, VIDEO, WITHOUT


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
            ),
            Benchmark(
                name="pointing",  # at the one digit, of up to three, that the question names
                dataset="demo-points",
                metric=points_in_boxes,
                target=0.6,
                max_new_tokens=80,
            ),
            Benchmark(
                name="video QA",
                dataset="demo-video-qa",
                metric=exact_match,
                chance=(1 / 10 + 1 / 4) / 2,  # half of the questions ask for the digit, half for one of four directions
                target=0.7,
            ),
        ),
    ),
    "image": Suite("molmo2-eval", IMAGE),
    "multi-image": Suite("molmo2-eval", MULTI_IMAGE),
    "video": Suite("molmo2-eval", VIDEO),
    "pointing": Suite("molmo2-eval", POINTING),
    "tracking": Suite("molmo2-eval", TRACKING),
}


def choose(names: str) -> list[Suite]:
    """The suites with the selected benchmarks; `names` are names of suites or benchmarks, separated by commas.

    Raises:
        ValueError: a name is neither; for a dataset without a benchmark the message gives the reason.
    """
    selected = [name.strip() for name in names.split(",")]
    known = {benchmark.name for suite in SUITES.values() for benchmark in suite.benchmarks}
    for name in selected:
        if name not in SUITES and name not in known:
            known_names = f"suites: {', '.join(SUITES)}; benchmarks: {', '.join(sorted(known))}"
            why = WITHOUT.get(name, f"unknown; {known_names}")
            raise ValueError(f"--benchmarks {name!r}: {why}")
    single = set(selected) - set(SUITES)  # a name of both a suite and a benchmark means the suite
    suites = []
    for name, suite in SUITES.items():
        benchmarks = tuple(b for b in suite.benchmarks if name in selected or b.name in single)
        if benchmarks:
            suites.append(replace(suite, benchmarks=benchmarks))
    return suites
