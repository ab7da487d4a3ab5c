"""Helpers for all HTML pages: filling in a template, readable numbers, and charts.

A page is one HTML file that loads nothing else; all but the chat page are without scripts. Every page extends
`base.html.jinja`, and `parts.html.jinja` has the tables and drawings that several pages share. Charts are SVG in the
page itself, drawn by matplotlib; a number that spans more than a factor of twenty has a logarithmic scale.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (4.2, 2.3)  # width and height of a chart, which a page scales to its column
LOG_SPAN = 20  # quotient of the extremes above which a scale is logarithmic
MOST_POINTS = 400  # a curve has at most this many points; longer logs are averaged
WINDOW = 1 / 20  # part of a curve over which the smooth line is averaged
COLOUR = "#1f5fa8"
UNITS = {  # the unit of each number of a log that has one, by the first part of its name
    "loss": "nats a token",
    "group_loss": "nats a token",
    "tokens_per_second": "tokens/s",
    "mfu": "%",
    "data_wait": "%",
    "working_share": "%",
    "fill": "%",
    "gpu_utilization": "%",
    "gpu_memory_gib": "GiB",
}
Lines = Sequence[Mapping[str, Any]]  # the lines of a log


def fill_template(name: str, /, **values: Any) -> str:
    """Fill in a Jinja template of this package; a name without a value is an error.

    Args:
        name: file relative to `molmo2/`. In `*.html.jinja` every value is escaped, except `Markup`.
        values: the values by name. The filters are `count`, `size`, `percent` and `histogram`.
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
ENVIRONMENT.filters |= {
    "count": lambda number: f"{number:,}",
    "size": size,
    "percent": percent,
    "histogram": lambda bins, label: histogram(bins.first, bins.width, bins.counts, label),
}


def averaged(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Means of steps and values over consecutive runs of equal length, at most `most` of them."""
    size = max(1, -(-len(values) // most))
    firsts = range(0, len(values), size)
    means = [[sum(part) / len(part) for part in (row[i : i + size] for i in firsts)] for row in (steps, values)]
    return means[0], means[1]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those around it, over `WINDOW` of all values."""
    reach = int(len(values) * WINDOW / 2)
    spans = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def noisy(values: Sequence[float]) -> bool:
    """Whether values change their direction often, so that a mean of neighbours shows more; a schedule does not."""
    steps = [after - before for before, after in itertools.pairwise(values)]
    turns = sum(one * other < 0 for one, other in itertools.pairwise(steps))
    return turns > len(values) / 10


def curve(steps: Sequence[float], values: Sequence[float], label: str, unit: str = "") -> Markup:
    """A curve by step: the values, faint where a smooth line is above them; empty for fewer than two values."""
    if len(values) < 2:
        return Markup()

    def draw(axes: Axes) -> None:
        from matplotlib import ticker as ticks

        places, means = averaged(steps, values, MOST_POINTS)
        smooth = smoothed(means) if noisy(means) else means
        if smooth != means:
            axes.plot(places, means, color=COLOUR, alpha=0.3, linewidth=0.8)
        axes.plot(places, smooth, color=COLOUR, linewidth=1.5)
        if 0 < min(means) * LOG_SPAN < max(means):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticks.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticks.NullLocator())
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)

    return _svg(draw, f"{label} by step")


def curves(lines: Lines, names: Sequence[str], prefix: str = "") -> list[tuple[str, Markup]]:
    """Titles and curves of these numbers, in this order; "lr.*" stands for all that begin with "lr.".

    Numbers with fewer than two values have no curve.
    """

    def place(name: str) -> int | None:
        matches = (name == wanted or (wanted.endswith("*") and name.startswith(wanted[:-1])) for wanted in names)
        return next(itertools.compress(itertools.count(), matches), None)

    columns: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if value is not None and place(name) is not None:
                unit = UNITS.get(name.partition(".")[0])
                steps, values = columns.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(100 * value if unit == "%" else value)
    order = sorted(columns, key=lambda name: (place(name), name))
    titles = ((name, prefix + name) for name in order)
    drawn = ((title, curve(*columns[name], title, UNITS.get(name.partition(".")[0], ""))) for name, title in titles)
    return [(title, svg) for title, svg in drawn if svg]


def histogram(first: int, width: int, counts: Sequence[int], label: str) -> Markup:
    """A histogram of one bin or more: bin i begins at `first + i * width`."""

    def draw(axes: Axes) -> None:
        axes.bar(
            [first + i * width for i in range(len(counts))],
            counts,
            width=0.9 * width,
            align="edge" if width > 1 else "center",
            color=COLOUR,
        )
        axes.set_xlabel(label)
        axes.set_ylabel("samples")
        axes.locator_params("y", integer=True)
        axes.locator_params("x", integer=width == 1)

    return _svg(draw, f"histogram: {label}")


def _svg(draw: Any, label: str) -> Markup:
    figure_type, settings = _matplotlib()
    with settings({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 8, "font.family": "sans-serif"}):
        figure = figure_type(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # In a page a drawing needs no names of schemas, no facts about its file, and no size of its own.
    (view,) = re.findall(r'<svg [^>]*?(viewBox="[^"]*")', text.getvalue())
    parts = text.getvalue().partition("</metadata>")[2]
    return Markup(f'<svg class="chart" role="img" aria-label="{escape(label)}" {view}>{parts}')


@functools.cache
def _matplotlib() -> tuple[Any, Any]:
    from matplotlib import rc_context  # takes half a second, which only a page needs
    from matplotlib.figure import Figure

    return Figure, rc_context
