"""Fetch the datasets of a catalog into raw folders.

    python tools/download_data.py --stage all --dry-run
    python tools/download_data.py --stage sft --datasets pixmo-cap cosyn-point
    python tools/download_data.py --datasets pixmo-cap --retry-failed
    python tools/download_data.py --show-manual-instructions

Files on disk are kept, and a killed download resumes. docs/download.md describes the folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from molmo2.config import data_path
from shards.catalog import STAGES, Catalog, CatalogError, Row, load_catalog
from shards.command import run
from shards.download.hub import DownloadError
from shards.download.manifest import Manifest, fetches, missing_folders
from shards.download.raw_folder import FillOptions, Forecast, fill, forecast
from shards.download.urls import DEFAULT_POLICY, FAILURES

TRAINING = tuple(stage for stage in STAGES if stage != "eval")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", default="all", choices=["all", *STAGES], help="all: the training stages; default %(default)s"
    )
    parser.add_argument("--catalog", default="molmo2", help="name of a catalog, or a YAML file (%(default)s)")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these (all of the stage)")
    parser.add_argument("--include-eval", action="store_true", help="evaluation sets as well")
    parser.add_argument(
        "--show-manual-instructions", action="store_true", help="print the steps for a person, and exit"
    )
    parser.add_argument("--dry-run", action="store_true", help="print files and GB, and exit")
    parser.add_argument("--retry-failed", action="store_true", help="retry only the images that failed before")
    parser.add_argument("--update", action="store_true", help="move to the newest commit of each repository")
    parser.add_argument("--max-images", type=int, metavar="N", help="only the images of each folder's first N URLs")
    parser.add_argument("--raw", type=Path, default=data_path("raw"), help="folder of the raw data (%(default)s)")
    parser.add_argument("--workers", type=int, default=DEFAULT_POLICY.workers, help="URLs at a time (%(default)s)")
    parser.add_argument(
        "--per-host", type=int, default=DEFAULT_POLICY.per_host, help="URLs of a host at a time (%(default)s)"
    )
    parser.add_argument(
        "--failure-budget",
        type=float,
        default=DEFAULT_POLICY.budget,
        help="largest fraction of failed images (%(default)s)",
    )
    args = parser.parse_args()
    if min(args.workers, args.per_host) < 1 or (args.max_images is not None and args.max_images < 1):
        parser.error("--workers, --per-host and --max-images must be at least 1")
    return args


def selected(catalog: Catalog, stage: str, names: list[str] | None, include_eval: bool) -> list[Row]:
    """The rows of the selected stages, or those with the given names."""
    stages = {*(TRAINING if stage == "all" else [stage]), *(["eval"] if include_eval else [])}
    rows = [row for row in catalog.all_rows if stages & set(row.stages)]
    if names is None:
        if not rows:
            raise catalog.no_rows(stage)
        return rows
    known = dict.fromkeys(row.name for row in catalog.all_rows)
    if unknown := [name for name in names if name not in known]:
        raise CatalogError(f"not in the catalog: {', '.join(unknown)}; known: {', '.join(known)}")
    others = [name for name in names if name not in {row.name for row in rows}]
    if others and stage != "all":
        raise CatalogError(f"not in stage {stage}: {', '.join(others)}")
    rows += [row for row in catalog.all_rows if row.name in others]  # a name alone may be that of an evaluation set
    return [row for name in dict.fromkeys(names) for row in rows if row.name == name]


def show_manual(catalog: Catalog, rows: list[Row], raw: Path) -> None:
    """Print the steps that only a person can take."""
    for name, download in catalog.downloads(rows).items():
        if download.instructions:
            print(f"{name}: {download.instructions}\n  folder: {raw / name}")


def show_forecast(catalog: Catalog, rows: list[Row], raw: Path) -> list[str]:
    """Print number of files and GB of every folder; returns the folders of unknown size."""
    published = {row.name: row.size for row in reversed(catalog.all_rows)} | {
        n: f.size for n, f in catalog.folders.items()
    }
    total, failed = Forecast(), []
    print(f"{'folder':<40} {'files':>7} {'GB':>9} {'to fetch':>9}")
    for name, download in catalog.downloads(rows).items():
        if not fetches(download):
            print(f"{name:<40} {'by hand' if download.kind == 'manual' else 'made by a tool of this project'}")
            continue
        try:
            size = forecast(download, raw / name)
        except DownloadError as error:
            print(f"{name:<40} not known: {error}")
            failed.append(name)
            continue
        notes = [f"{size.unknown} files of unknown size"] if size.unknown else []
        if download.url_column:
            rows_known = published[name].rows
            notes.append(f"images behind URLs, of at most {rows_known:,} rows" if rows_known else "images behind URLs")
        print(f"{name:<40} {size.files:>7} {size.bytes / 1e9:>9.3f} {size.missing / 1e9:>9.3f}  {'; '.join(notes)}")
        total = total + size
    free = shutil.disk_usage(next(path for path in [raw, *raw.resolve().parents] if path.exists())).free
    print(f"{'total':<40} {total.files:>7} {total.bytes / 1e9:>9.3f} {total.missing / 1e9:>9.3f}")
    print(f"free at {raw}: {free / 1e9:.1f} GB. Images behind URLs and unpacked archives need more.")
    return failed


def print_outcome(manifest: Manifest, folder: Path) -> None:
    """Print a line about a complete folder, after its warnings."""
    files = [*(manifest.listing.files if manifest.listing else ()), *manifest.archives]
    for warning in manifest.warnings:
        print(f"download_data: {manifest.name}: warning: {warning}", file=sys.stderr)
    line = f"{manifest.name}: {len(files)} files, {sum(file.bytes for file in files) / 1e9:.3f} GB"
    if manifest.extracted:
        line += f", {sum(manifest.extracted.values())} unpacked"
    if media := manifest.media:
        line += f", {media.present} of {media.urls} images"
        line += f", {media.failed} failed ({folder / FAILURES}; --retry-failed asks again)" if media.failed else ""
    print(line)


def main() -> None:
    """Fill the folders of all selected datasets; a failure does not stop the others."""
    args = parse_args()
    catalog = load_catalog(args.catalog)
    rows = selected(catalog, args.stage, args.datasets, args.include_eval)
    if args.show_manual_instructions:
        return show_manual(catalog, rows, args.raw)
    if args.dry_run:
        if failed := show_forecast(catalog, rows, args.raw):
            sys.exit(f"download_data: sizes not known: {', '.join(failed)}")
        return None
    policy = dataclasses.replace(
        DEFAULT_POLICY, workers=args.workers, per_host=args.per_host, budget=args.failure_budget
    )
    options = FillOptions(retry_failed=args.retry_failed, update=args.update, max_images=args.max_images, policy=policy)
    for name, download in catalog.downloads(rows).items():
        if not fetches(download):
            continue
        try:
            print_outcome(fill(name, download, args.raw / name, options), args.raw / name)
        except DownloadError as error:  # the other datasets are still downloaded
            print(f"download_data: {name}: {error}", file=sys.stderr)
    lacking = [row for row in rows if missing_folders(catalog, row, args.raw)]
    for row in lacking:
        print(f"download_data: {row.name} is not complete\n  {catalog.how_to_get(row)}", file=sys.stderr)
    if lacking:
        sys.exit(f"download_data: not complete, {len(lacking)} of {len(rows)}: {', '.join(r.name for r in lacking)}")
    return None


if __name__ == "__main__":
    run(main)
