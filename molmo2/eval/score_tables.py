"""The scores of an evaluation as a table for the terminal, and as a page with the worst answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from molmo2.pages import fill_template, percent


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
