"""Helpers for all HTML pages: filling in a template, curves as SVG, and readable numbers.

A page is one HTML file that loads nothing else; all but the chat page are without scripts. Every page extends
`base.html.jinja`, and `parts.html.jinja` has the tables and drawings that several pages share.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 180, 44, 22  # size and margins of a curve, in SVG units
MAX_POINTS = 300  # a curve has at most this many points; longer logs are averaged
Lines = Sequence[Mapping[str, Any]]  # the lines of a log


def fill_template(name: str, /, **values: Any) -> str:
    """Fill in a Jinja template of this package; a name without a value is an error.

    Args:
        name: file relative to `molmo2/`. In `*.html.jinja` every value is escaped, except `Markup`.
        values: the values by name. The filters are `count`, `size` and `percent`.
    """
    return ENVIRONMENT.get_template(name).render(values)


def size(num_bytes: float) -> str:
    """A number of bytes as text, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return "-" if fraction is None else f"{fraction:.{digits}%}"


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {"count": lambda number: f"{number:,}", "size": size, "percent": percent}


def averaged(values: Sequence[float], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Average consecutive values in groups of equal length: at most `most` points (step, mean), steps from 1."""
    size = max(1, -(-len(values) // most))
    runs = [values[first : first + size] for first in range(0, len(values), size)]
    return [(i * size + (len(run) + 1) / 2, sum(run) / len(run)) for i, run in enumerate(runs)]


def curve(values: Sequence[float], label: str = "loss by step", first: int = 1, last: int | None = None) -> Markup:
    """An SVG curve of `values` with the extremes on the axes; an empty string for fewer than two values.

    `first` and `last`: the steps of the first and the last value; the last is the number of values unless given.
    """
    points = averaged(values)
    if len(points) < 2:
        return Markup()
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
        (str(first), LEFT, HEIGHT),
        (str(last or len(values)), WIDTH - 34, HEIGHT),
    )
    texts = "".join(f'<text x="{x}" y="{y}">{html.escape(text)}</text>' for text, x, y in labels)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT + 6}" width="{WIDTH}" role="img" '
        f'aria-label="{html.escape(label)}">'
        f'<path d="M{LEFT},4V{floor}H{WIDTH}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>{texts}</svg>'
    )


def curves(lines: Lines, kinds: Sequence[str], prefix: str = "") -> list[tuple[str, Markup]]:
    """Titles and SVG curves of every number of these kinds: "loss", then "loss.<dataset>", in the order of `kinds`.

    Numbers with fewer than two values have no curve.
    """
    columns: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if value is not None and name.partition(".")[0] in kinds:
                columns.setdefault(name, []).append(value)
    order = sorted(columns, key=lambda name: (kinds.index(name.partition(".")[0]), name))
    first, last = (lines[0]["step"], lines[-1]["step"]) if lines else (0, 0)
    drawn = ((prefix + name, curve(columns[name], f"{prefix}{name} by step", first, last)) for name in order)
    return [(title, svg) for title, svg in drawn if svg]
