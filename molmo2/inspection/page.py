"""HTML pages of the inspection tools: a stage of built shards, and examples of sources before they are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molmo2.inspection.facts import DatasetFacts
from molmo2.inspection.originals import ExampleView
from molmo2.inspection.samples import SampleView
from molmo2.inspection.shares import Share
from molmo2.pages import fill_template
from shards.catalog import Row, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePage:
    """The content of a page. The keys of `samples` are datasets; `mixture` is empty without a recipe."""

    stage: str
    where: str
    datasets: Sequence[DatasetFacts]
    samples: dict[str, Sequence[SampleView]]
    unfinished: Sequence[str] = ()
    mixture: Sequence[Share] = ()
    mixture_of: str = ""


def render_stage(page: StagePage) -> str:
    """The HTML page of a stage."""
    return fill_template(Path(__file__).with_name("shards.html.jinja"), {"page": page})


def render_originals(
    title: str, datasets: Sequence[tuple[Row, Stage]], views: Mapping[str, Sequence[ExampleView]]
) -> str:
    """The HTML page of examples: rows of the catalog with their stage, and the examples that were read of each."""
    values = {"title": title, "datasets": datasets, "views": views}
    return fill_template(Path(__file__).with_name("originals.html.jinja"), values)
