"""Two HTML pages: a report of several runs and one evaluation, and the worst answers. They have no scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2.pages import curve, fill_template
from molmo2.training.metrics import read_log
from molmo2.training.run import LOG_NAME

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A finished run: its `summary.json` and the loss of every step."""

    summary: Mapping[str, Any]
    losses: Sequence[float]


def read_stage(run_dir: Path) -> Stage:
    """Read a run's summary and losses.

    Raises:
        ValueError: the run is missing or has not finished.
    """
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir}: no summary.json: the run has not finished; start its recipe again") from None
    losses = [line["loss"] for line in read_log(run_dir / LOG_NAME) if line["loss"] is not None]
    return Stage(summary=summary, losses=losses)


def render_report(title: str, stages: Sequence[Stage], evaluation: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """The report's HTML.

    Args:
        title: heading.
        stages: in the order in which they were trained.
        evaluation: the content of the JSON file of `tools/evaluate.py`.
        facts: lines below the heading, name and value.
    """
    curves = [(stage.summary["name"], curve(stage.losses)) for stage in stages]
    summaries = [stage.summary for stage in stages]
    values = {"title": title, "stages": summaries, "curves": curves, "evaluation": evaluation, "facts": facts}
    return fill_template(HERE / "report.html", values)


def render_worst(title: str, evaluation: Mapping[str, Any]) -> str:
    """A page of the scores and, for each benchmark, the answers with the lowest ones; `evaluation` as in `render`."""
    return fill_template(HERE / "worst.html", {"title": title, "evaluation": evaluation})
