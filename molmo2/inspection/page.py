"""A stage of built shards as one HTML file: no scripts, no links to other files, everything escaped by jinja2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from molmo2.inspection.facts import DatasetFacts
from molmo2.inspection.mixture import Share
from molmo2.inspection.samples import SampleView


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePage:
    """What a page shows. `samples` goes by dataset; `mixture` is empty where no recipe was given."""

    stage: str
    where: str
    datasets: Sequence[DatasetFacts]
    samples: dict[str, Sequence[SampleView]]
    unfinished: Sequence[str] = ()
    mixture: Sequence[Share] = ()
    mixture_of: str = ""


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["size"] = size
    environment.filters["percent"] = lambda share: f"{share:.2%}"
    return environment.get_template(template).render(**values)


def render_stage(page: StagePage) -> str:
    """The HTML of a stage."""
    return render("shards.html.jinja", page=page)


def size(num_bytes: float) -> str:
    """Bytes for people, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
