"""Benchmarks: the field `benchmark` of catalog rows, with its metrics, in suites.

A benchmark is data: its row of the catalog says which suite it belongs to, how answers are scored, and how long they
may be. Further inputs of a metric (`answers`, `masks`, `fps`, ...) are `facts` of the row, under the names in the
metric's docstring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from molmo2.eval.metrics.caption_scores import JudgeOfCaptions, cider, rouge_l, statement_f1
from molmo2.eval.metrics.choices import multiple_choice
from molmo2.eval.metrics.point_scores import all_in_mask, count_close, point_f1, video_point_f1
from molmo2.eval.metrics.scores import (
    CorpusMetric,
    Metric,
    count_exact,
    exact_match,
    points_in_boxes,
)
from molmo2.eval.metrics.text_scores import anls, answer_or_choice, direct_answer, relaxed_accuracy, vqa_accuracy
from molmo2.eval.metrics.track_scores import hota, track_f1
from shards.catalog import BenchmarkSpec, Catalog, Row, load_catalog
from shards.catalog.nearest import did_you_mean, nearest
from shards.format import INDEX_NAME
from shards.storage.open import open_storage

if TYPE_CHECKING:
    from molmo2.config import Recipe

STAGE: Final = "eval"
BATCH_SIZE: Final = 32  # questions that are answered together

METRICS: Final[dict[str, Metric]] = {
    metric.__name__: metric
    for metric in (
        all_in_mask,
        anls,
        answer_or_choice,
        count_close,
        count_exact,
        direct_answer,
        exact_match,
        multiple_choice,
        point_f1,
        points_in_boxes,
        relaxed_accuracy,
        rouge_l,
        track_f1,
        video_point_f1,
        vqa_accuracy,
    )
}
CORPUS_METRICS: Final[dict[str, CorpusMetric]] = {metric.__name__: metric for metric in (cider, hota)}
# metrics of all answers together that a judge must be given for
JUDGED_METRICS: Final[dict[str, Callable[[JudgeOfCaptions], CorpusMetric]]] = {statement_f1.__name__: statement_f1}

# suite -> the catalog whose rows name it
SUITES: Final = {
    "demo": "demo",
    "image": "molmo2-eval",
    "multi-image": "molmo2-eval",
    "video": "molmo2-eval",
    "pointing": "molmo2-eval",
    "tracking": "molmo2-eval",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One line of the result table; the processor renders the prompts from the annotations.

    Attributes:
        name: unique among all benchmarks.
        dataset: name of the dataset in the catalog; its stage is "eval".
        metric: scores one answer.
        chance: expected score of a blind guess; None if the metric gives it for each question.
        target: the score that the demo should reach.
        max_new_tokens: maximum length of an answer, in tokens.
        corpus: scores of all answers together, reported besides the mean of `metric`.
        judged: names of further such scores, which need a judge.
    """

    name: str
    dataset: str
    metric: Metric
    chance: float | None
    target: float | None
    max_new_tokens: int
    corpus: tuple[CorpusMetric, ...]
    judged: tuple[str, ...]

    def with_judge(self, judge: JudgeOfCaptions) -> Benchmark:
        """The benchmark with its judged scores."""
        judged = tuple(JUDGED_METRICS[name](judge) for name in self.judged)
        return replace(self, corpus=self.corpus + judged, judged=())


@dataclass(frozen=True, slots=True)
class Suite:
    """Benchmarks over one catalog."""

    catalog: str
    benchmarks: tuple[Benchmark, ...]


def suites_of(name: str, catalog: Catalog) -> dict[str, Suite]:
    """The suites of the catalog `name`, with the benchmarks of its rows in their order.

    Raises:
        ValueError: a row names an unknown metric or a suite of another catalog.
    """
    known = [suite for suite, home in SUITES.items() if home == name]
    suites: dict[str, list[Benchmark]] = {suite: [] for suite in known}
    for row in catalog.rows:
        for spec in row.benchmark:
            _named(row, "suite", spec.suite, suites).append(_benchmark(row, spec))
    return {suite: Suite(name, tuple(benchmarks)) for suite, benchmarks in suites.items()}


def own_suite(name: str, names: str | None = None, source: str = "--benchmarks") -> Suite:
    """The benchmarks of a catalog of one's own, with every `metric` and `benchmark` of its rows.

    Args:
        name: path of the catalog.
        names: only these benchmarks or datasets, separated by commas; None: all.
        source: where the names were given, for messages.

    Raises:
        ValueError: a row names an unknown metric, or a name is unknown.
    """
    benchmarks = [_benchmark(row, spec) for row in load_catalog(name).all_rows for spec in row.benchmarks]
    if names is None:
        return Suite(name, tuple(benchmarks))
    selected = [name.strip() for name in names.split(",")]
    known = {text for benchmark in benchmarks for text in (benchmark.name, benchmark.dataset)}
    if unknown := [text for text in selected if text not in known]:
        raise ValueError(f"{source} {unknown[0]!r}: no row of {name} has it; {nearest(unknown[0], sorted(known))}")
    return Suite(name, tuple(b for b in benchmarks if b.name in selected or b.dataset in selected))


def is_built(shards: str, dataset: str) -> bool:
    """Whether a dataset of stage "eval" has finished shards; `shards` is the folder or URL of all stages."""
    return open_storage(f"{shards.rstrip('/')}/{STAGE}/{dataset}").size(INDEX_NAME) is not None


def reason_left_out(dataset: str) -> str | None:
    """The reason why a published dataset has no row of stage "eval"; None if there is no such dataset."""
    return load_catalog("molmo2-eval").left_out.get(dataset)


def _benchmark(row: Row, spec: BenchmarkSpec) -> Benchmark:
    corpus = {name: _named(row, "corpus", name, CORPUS_METRICS | JUDGED_METRICS) for name in spec.corpus}
    return Benchmark(
        name=spec.name or row.name,
        dataset=row.name,
        metric=_named(row, "metric", spec.metric, METRICS),
        chance=spec.chance,
        target=spec.target,
        max_new_tokens=spec.max_new_tokens,
        corpus=tuple(metric for name, metric in corpus.items() if name in CORPUS_METRICS),
        judged=tuple(name for name in corpus if name in JUDGED_METRICS),
    )


def _named(row: Row, key: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"row {row.name}: benchmark.{key}: {name!r} is unknown; {nearest(name, known)}")
    return known[name]


@functools.cache
def load_suites() -> dict[str, Suite]:
    """All suites, read from their catalogs, in the order of `SUITES`."""
    loaded: dict[str, Suite] = {}
    for catalog in dict.fromkeys(SUITES.values()):
        loaded |= suites_of(catalog, load_catalog(catalog))
    return loaded


def choose(names: str, source: str = "--benchmarks") -> list[Suite]:
    """The suites with the selected benchmarks.

    Args:
        names: names of suites or benchmarks, separated by commas.
        source: where the names were given, for messages.

    Raises:
        ValueError: a name is neither; for a published dataset without a benchmark the message gives the reason.
    """
    selected, loaded = [name.strip() for name in names.split(",")], load_suites()
    known = {benchmark.name for suite in loaded.values() for benchmark in suite.benchmarks}
    for name in selected:
        if name not in loaded and name not in known:
            known_names = f"suites: {', '.join(loaded)}; benchmarks: {', '.join(sorted(known))}"
            unknown = f"unknown; {did_you_mean(name, [*loaded, *sorted(known)])}{known_names}"
            raise ValueError(f"{source} {name!r}: {reason_left_out(name) or unknown}")
    single = set(selected) - set(loaded)  # a name of both a suite and a benchmark means the suite
    suites = []
    for name, suite in loaded.items():
        benchmarks = tuple(b for b in suite.benchmarks if name in selected or b.name in single)
        if benchmarks:
            suites.append(replace(suite, benchmarks=benchmarks))
    return suites


def choose_of_recipe(names: Sequence[str], catalog: str | None) -> list[Suite]:
    """The suites with the benchmarks that a recipe names: `eval.benchmarks`, and `eval.catalog` if it is not None.

    Raises:
        ValueError: a name is unknown; nothing is said about whether its dataset is built.
    """
    joined, source = ",".join(names), "eval.benchmarks"
    return choose(joined, source) if catalog is None else [own_suite(catalog, joined, source)]


def check_recipes(recipes: Iterable[Recipe]) -> None:
    """Check the names of the benchmarks of recipes, before the first of them trains.

    Raises:
        ValueError: a name is unknown.
    """
    for recipe in recipes:
        if recipe.eval is not None and recipe.eval.benchmarks:
            try:
                choose_of_recipe(recipe.eval.benchmarks, recipe.eval.catalog)
            except (ValueError, OSError) as error:
                raise ValueError(f"recipe {recipe.name}: {error}") from None
