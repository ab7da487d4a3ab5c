"""Show which datasets of a catalog are downloaded, built or missing, or show samples of their raw data.

    python tools/inspect_data.py
    python tools/inspect_data.py --catalog demo --stage sft
    python tools/inspect_data.py pixmo-cap --num-samples 10
    python tools/inspect_data.py --catalog demo demo-points demo-video-track --html samples.html

With names, samples are printed as text, or with --html written to a page with images and video frames. Without names,
the tables are followed by the commands that download and build what is missing. These leave out evaluation datasets,
whose shards are built with `python tools/build_shards.py --stage eval --catalog NAME`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.table import Table

from molmo2.config import data_path
from molmo2.inspection.inventory import Entry, commands, inventory
from molmo2.inspection.originals import ExampleView, lines, view_examples
from molmo2.pages import fill_template, size
from shards.atomic import write_atomic
from shards.catalog import STAGES, Catalog, CatalogError, Row, Stage, load_catalog
from shards.command import plain, run
from shards.sources.parquet import MissingSourceError, SourceError

WIDE = 160  # width in characters of a table that is written to a file


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", metavar="NAME", help="show samples of these datasets")
    parser.add_argument("--stage", default="all", choices=["all", *STAGES], help="only this stage (%(default)s)")
    parser.add_argument("--catalog", default="molmo2", help="name of a catalog, or a YAML file (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=4, help="examples of each dataset (%(default)s)")
    parser.add_argument("--html", type=Path, help="write the samples to a page, with their images and frames")
    parser.add_argument("--raw", type=Path, default=data_path("raw"), help="raw data (%(default)s)")
    parser.add_argument("--shards", type=Path, default=data_path("shards"), help="built shards (%(default)s)")
    args = parser.parse_args()
    if args.num_samples < 1:
        parser.error(f"--num-samples {args.num_samples}: at least 1")
    if args.html and not args.datasets:
        parser.error("--html shows samples: name the datasets")
    return args


def stage_table(stage: str, entries: Sequence[Entry]) -> Table:
    """One line per dataset of a stage."""
    there, built = sum(e.raw == "there" for e in entries), sum(e.built == "built" for e in entries)
    title = f"Stage {stage}: {there} of {len(entries)} datasets are here, {built} built"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("dataset", no_wrap=True)
    for name in ("raw data", "on disk", "published rows", "published", "shards", "samples", "size"):
        table.add_column(name, justify="left" if name in {"raw data", "shards"} else "right", no_wrap=True)
    for entry in entries:
        published, totals = entry.row.size, entry.totals
        table.add_row(
            entry.row.name,
            entry.raw,
            size(entry.raw_bytes) if entry.raw_bytes else "-",
            "-" if published.rows is None else f"{published.rows:,}",
            "-" if published.gb is None else f"{published.gb:,.2f} GB",
            # Evaluation reads shards too, but only those of the benchmarks that are run: most need not be built.
            "-" if stage == "eval" and entry.built == "not built" else entry.built,
            f"{totals.samples:,}" if totals else "-",
            size(totals.bytes) if totals else "-",
        )
    return table


def show_inventory(args: argparse.Namespace, catalog: Catalog) -> None:
    """Print the tables and the commands for what is missing."""
    stages: list[Stage] = [s for s in get_args(Stage) if args.stage == s or (args.stage == "all" and catalog.select(s))]
    if not any(catalog.select(stage) for stage in stages):
        raise catalog.no_rows(args.stage)
    entries = list(inventory(catalog, stages, args.raw, args.shards))
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    for stage in stages:
        console.print(stage_table(stage, [entry for entry in entries if entry.stage == stage]), markup=False)
    for line in commands(entries, args.catalog):
        print(line)


def choose_rows(catalog: Catalog, names: Sequence[str], stage: str) -> list[tuple[Row, Stage]]:
    """The named rows, each with the stage to show: `stage`, or the row's first one if `stage` is "all".

    Raises:
        CatalogError: a name is unknown or not in the stage.
    """
    rows = {row.name: row for row in reversed(catalog.all_rows)}  # a training row before an evaluation row of its name
    rows |= {row.name: row for row in catalog.all_rows if stage in row.stages}
    if unknown := [name for name in names if name not in rows]:
        raise CatalogError(f"not in the catalog: {', '.join(unknown)}; `python tools/inspect_data.py` lists all")
    if elsewhere := [name for name in names if stage not in {"all", *rows[name].stages}]:
        raise CatalogError(f"not in stage {stage}: {', '.join(elsewhere)}")
    return [(rows[name], next(s for s in rows[name].stages if stage in {"all", s})) for name in names]


def main() -> None:
    """Print the inventory, or samples; a missing dataset does not stop the others."""
    args = parse_args()
    catalog = load_catalog(args.catalog)
    if not args.datasets:
        return show_inventory(args, catalog)
    selection, failed = choose_rows(catalog, args.datasets, args.stage), []
    views: dict[str, list[ExampleView]] = {}
    for row, stage in selection:
        raw = args.raw / row.folder
        try:
            views[row.name] = list(view_examples(row, stage, raw, args.num_samples, pictures=args.html is not None))
        except SourceError as error:
            hint = f"\n  {catalog.how_to_get(row)}" if isinstance(error, MissingSourceError) else ""
            print(f"inspect_data: {plain(str(error))}{hint}", file=sys.stderr)
            failed.append(row.name)
            continue
        except Exception as error:  # whatever a published table or image causes: the other datasets are shown
            print(f"inspect_data: {row.name}: {plain(f'{type(error).__name__}: {error}')}", file=sys.stderr)
            failed.append(row.name)
            continue
        if not args.html:
            print(f"{row.name}, stage {stage}")
            print("\n".join(lines(views[row.name])))
    if args.html and views:
        shown = [(row, stage) for row, stage in selection if row.name in views]
        title = f"Samples of {', '.join(views)}"
        page = fill_template("inspection/originals.html.jinja", title=title, datasets=shown, views=views)
        write_atomic(args.html, page)
        print(f"page: {args.html}")
    if failed:
        sys.exit(f"inspect_data: not shown: {', '.join(failed)}")
    return None


if __name__ == "__main__":
    run(main)
