"""Inspect built shards: counts, lengths, rejects, mixture, and samples as the model sees them.

    python tools/inspect_shards.py data/shards/sft
    python tools/inspect_shards.py data/shards/sft --html sft.html --recipe recipes/demo/stage2.yaml
    python tools/inspect_shards.py data/shards/sft/demo-points --html points.html --num-samples 20

DIR is the folder or s3:// URL of a dataset, of a stage, or of all stages. With several stages each gets its own page:
all.html becomes all-sft.html and so on. A page is one file without scripts or links to other files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from molmo2.config import Recipe, data_path, load_recipe
from molmo2.inspection.facts import DatasetFacts, facts_of, find
from molmo2.inspection.samples import SampleView, thumbnails, tokenizer_of, view_sample
from molmo2.inspection.shares import Share, draw_summary, plan_and_draw, shares_of
from molmo2.pages import fill_template, size
from molmo2.processing.pictures import spread
from shards.atomic import write_atomic
from shards.command import run
from shards.stream.dataset import Dataset

WIDE = 160  # width in characters of a table that is written to a file


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", metavar="DIR", help="folder of a dataset, of a stage, or of all stages")
    parser.add_argument("--html", type=Path, help="write a page with samples")
    parser.add_argument("--num-samples", type=int, default=2, help="samples of every dataset on the page (%(default)s)")
    parser.add_argument("--recipe", type=Path, help="show the shares of this recipe's datasets, asked and drawn")
    parser.add_argument("--steps", type=int, default=200, help="first steps of the recipe to plan (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the recipe's, or raw/tokenizer)")
    args = parser.parse_args()
    if args.num_samples < 0 or args.steps < 1:
        parser.error("--num-samples must be at least 0 and --steps at least 1")
    return args


def counts_table(stage: str, datasets: Sequence[DatasetFacts]) -> Table:
    """One line per dataset of a stage."""
    table = Table(title=f"Stage {stage}", title_justify="left", box=box.SIMPLE)
    table.add_column("dataset", no_wrap=True)
    for name in (
        "samples",
        "branches",
        "tokens",
        "each",
        "at most",
        "frames",
        "at most",
        "size",
        "rejected",
        "left out",
    ):
        table.add_column(name, justify="right")
    for facts in datasets:
        totals, frames = facts.index.totals, f"{facts.frames.most:,}" if facts.frames else "-"
        lengths = (f"{totals.tokens:,}", f"{facts.tokens.mean:,.0f}", f"{facts.tokens.most:,}")
        counts = (f"{totals.samples:,}", f"{totals.annotations:,}", *lengths, f"{totals.frames:,}", frames)
        table.add_row(facts.name, *counts, size(totals.bytes), f"{facts.num_faults:,}", f"{facts.num_omitted:,}")
    return table


def mixture_table(title: str, shares: Sequence[Share]) -> Table:
    """One line per dataset of the recipe."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("group")
    table.add_column("dataset", no_wrap=True)
    for name in ("asked", "drawn", "of tokens", "epochs"):
        table.add_column(name, justify="right")
    for share in shares:
        parts = (f"{share.asked:.2%}", f"{share.drawn:.2%}", f"{share.tokens:.2%}", f"{share.epochs:.2f}")
        table.add_row(share.group, share.name, *parts)
    return table


def rejects_table(datasets: Sequence[DatasetFacts]) -> Table | None:
    """One line per reason; None if nothing was left out."""
    table = Table(title="Rejected or left out", title_justify="left", box=box.SIMPLE)
    for name in ("dataset", "examples", "on purpose", "reason", "first one"):
        table.add_column(name, justify="right" if name == "examples" else "left")
    for facts in datasets:
        for reason in facts.reasons:
            purpose = "yes" if reason.omitted else "no"
            table.add_row(facts.name, f"{reason.num_examples:,}", purpose, reason.reason, reason.example)
    return table if table.row_count else None


def shown_samples(
    datasets: Sequence[Dataset], tokenizer_dir: Path, num_samples: int
) -> dict[str, Sequence[SampleView]]:
    """Samples of every dataset, evenly spread over it."""
    samples: dict[str, Sequence[SampleView]] = {}
    for dataset in tqdm(datasets, desc="samples", unit="dataset", leave=False):
        chosen = spread(len(dataset), num_samples)
        tokenizer = tokenizer_of(dataset, tokenizer_dir) if chosen else None
        samples[dataset.name] = [view_sample(dataset, number, tokenizer) for number in chosen if tokenizer]
    return samples


def mixture_of(recipe: Recipe, steps: int) -> tuple[str, list[Share], list[str]]:
    """A title, the shares of the recipe's datasets in its first steps, and sentences on the fill of their packs."""
    plan, drawn = plan_and_draw(recipe, steps)
    title = f"Recipe {recipe.name}: the first {drawn.steps} of {recipe.train.steps} steps"
    return title, shares_of(recipe, plan, drawn), draw_summary(recipe, drawn)


def page_path(html: Path, stage: str, num_stages: int) -> Path:
    """Path of a stage's page."""
    return html if num_stages == 1 else html.with_name(f"{html.stem}-{stage}{html.suffix}")


def main() -> None:
    """Print the tables and write the pages."""
    args = parse_args()
    recipe = load_recipe(args.recipe) if args.recipe else None
    tokenizer_dir = args.tokenizer or data_path(recipe.tokenizer if recipe else "raw/tokenizer")
    found = find(args.dir)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    title, shares, fill = mixture_of(recipe, args.steps) if recipe else ("", [], [])
    for stage, datasets in found.stages.items():
        facts = [facts_of(dataset) for dataset in datasets]
        rejects = rejects_table(facts)
        console.print(counts_table(stage, facts), *([rejects] if rejects else []), markup=False)
        if args.html:
            page = fill_template(
                "inspection/shards.html.jinja",
                title=f"Shards of stage {stage}",
                where=args.dir,
                datasets=facts,
                samples=shown_samples(datasets, tokenizer_dir, args.num_samples),
                thumbnails={
                    (each.name, oddity.kind): thumbnails(dataset, oddity.shown)
                    for dataset, each in zip(datasets, facts, strict=True)
                    for oddity in each.oddities
                },
                unfinished=found.unfinished,
                mixture=shares,
                mixture_of=title,
                mixture_fill=fill,
            )
            path = page_path(args.html, stage, len(found.stages))
            write_atomic(path, page)
            print(f"page: {path}")
    if shares:
        console.print(mixture_table(title, shares), markup=False)
    for folder in found.unfinished:
        print(f"not finished: {folder}; run the same tools/build_shards.py command again to resume")


if __name__ == "__main__":
    run(main)
