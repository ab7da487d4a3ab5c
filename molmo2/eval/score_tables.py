"""The list of benchmarks, and the scores of an evaluation: a table, and a page with the worst answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from molmo2.eval.benchmarks import Suite, is_built
from molmo2.pages import fill_template, percent


def list_lines(suites: Mapping[str, Suite], loss_only: Sequence[str], shards: str) -> Iterator[str]:
    """The lines of `--list`: suite, benchmark, metrics, dataset, and whether it is built below `shards`.

    Args:
        suites: the suites by name.
        loss_only: datasets without a metric, of which only the loss can be computed.
        shards: folder or URL of the shards of all stages.
    """
    rows = [("suite", "benchmark", "metric", "dataset", "shards")]
    for name, suite in suites.items():
        for benchmark in suite.benchmarks:
            metrics = ", ".join(
                [metric.__name__ for metric in (benchmark.metric, *benchmark.corpus)]
                + [f"{name} (--judge)" for name in benchmark.judged]
            )
            rows.append((name, benchmark.name, metrics, benchmark.dataset, _built(shards, benchmark.dataset)))
    rows += [("-", "-", "loss only", dataset, _built(shards, dataset)) for dataset in loss_only]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _built(shards: str, dataset: str) -> str:
    return "built" if is_built(shards, dataset) else "not built"


def results_table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """The table of the benchmarks' scores."""
    table = Table(title=title, title_justify="left")
    for name in ("benchmark", "metric"):
        table.add_column(name)
    for name in ("questions", "score", "chance", "target"):
        table.add_column(name, justify="right")
    for result in results:
        shown = (percent(result[key]) for key in ("score", "chance", "target"))
        table.add_row(result["name"], result["metric"], str(result["num_questions"]), *shown)
        if result["num_left_out"]:
            table.add_row("", f"{result['num_left_out']} rows left out", "", "", "", "")
        for name, value in result["corpus"].items():
            table.add_row("", f"{name}, all answers", "", f"{value:.3f}", "", "")
    return table


def scores_page(title: str, evaluation: Mapping[str, Any]) -> str:
    """The HTML page of an evaluation: the content of the JSON file of `tools/evaluate.py`."""
    facts = {"checkpoint": evaluation["checkpoint"]}
    return fill_template("eval/scores.html.jinja", title=title, facts=facts, evaluation=evaluation, shown="worst")
