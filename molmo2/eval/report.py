"""A report of several runs and one evaluation, and a page of the worst answers: each one HTML file, no scripts."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from molmo2.metrics import LOG_NAME, read_log

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 180, 44, 22  # of a curve, SVG units
MOST_POINTS = 300  # of a curve; longer logs are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A finished run: its `summary.json` and the loss of every step."""

    summary: Mapping[str, Any]
    losses: Sequence[float]


def read_stage(run_dir: Path) -> Stage:
    """A run's summary and losses.

    Raises:
        ValueError: the run is missing or has not finished.
    """
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir}: no summary.json: the run has not finished; start its recipe again") from None
    losses = [line["loss"] for line in read_log(run_dir / LOG_NAME) if line["loss"] is not None]
    return Stage(summary=summary, losses=losses)


def percent(share: float | None) -> str:
    """A share as a table shows it; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"


def averaged(values: Sequence[float], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """(step, mean) of runs of equal length, at most `most` of them; steps count from 1."""
    size = max(1, -(-len(values) // most))
    runs = [values[first : first + size] for first in range(0, len(values), size)]
    return [(i * size + (len(run) + 1) / 2, sum(run) / len(run)) for i, run in enumerate(runs)]


def curve(values: Sequence[float], label: str = "loss by step", last: int | None = None) -> str:
    """An SVG line of `values` over their number, with the extremes written on the axes; "" for fewer than two.

    `last`: the step of the last value, where it is not their number.
    """
    points = averaged(values)
    if len(points) < 2:
        return ""
    top = max(value for _, value in points)
    bottom = min(0.0, min(value for _, value in points))
    span = (top - bottom) or 1.0

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT) * step / len(values)
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (top - value) / span + 4:.1f}"

    line = " ".join(place(step, value) for step, value in points)
    floor = HEIGHT - BOTTOM + 4
    labels = (
        (f"{top:.3g}", 0, 14),
        (f"{bottom:.3g}", 0, floor),
        ("1", LEFT, HEIGHT),
        (str(last or len(values)), WIDTH - 34, HEIGHT),
    )
    texts = "".join(f'<text x="{x}" y="{y}">{html.escape(text)}</text>' for text, x, y in labels)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 6}" width="{WIDTH}" role="img" aria-label="{html.escape(label)}">'
        f'<path d="M{LEFT},4V{floor}H{WIDTH}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>{texts}</svg>'
    )


def render(title: str, stages: Sequence[Stage], evaluation: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """The report's HTML.

    Args:
        title: heading.
        stages: in the order in which they were trained.
        evaluation: what `tools/evaluate.py` wrote.
        facts: lines below the heading, name and value.
    """
    curves = [(stage.summary["name"], curve(stage.losses)) for stage in stages]
    return _template("report.html").render(
        title=title, stages=[stage.summary for stage in stages], curves=curves, evaluation=evaluation, facts=facts
    )


def render_worst(title: str, evaluation: Mapping[str, Any]) -> str:
    """A page of the scores and, for each benchmark, the answers with the lowest ones; `evaluation` as in `render`."""
    return _template("worst.html").render(title=title, evaluation=evaluation)


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)
