"""Build shards of a stage from raw data.

    python tools/build_shards.py --stage sft
    python tools/build_shards.py --stage sft --catalog demo --datasets demo-points demo-chat --workers 4

Finished datasets are kept, and a build that was killed continues with the shards that are missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from pathlib import Path

from molmo2.config import data_path
from molmo2.processing import ProcessorSettings, build_processor
from shards.build_folder import BuildError
from shards.builder import REJECT_BUDGET, build_dataset, worker_pool
from shards.catalog import STAGES, load_catalog
from shards.download.manifest import unfinished_folders
from shards.format import DatasetIndex
from shards.sources.parquet import MissingSourceError, SourceError


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--catalog", default="molmo2", help="name of a catalog, or a YAML file (%(default)s)")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these (all of the stage)")
    parser.add_argument("--raw", type=Path, default=data_path("raw"), help="raw data (%(default)s)")
    parser.add_argument("--out", type=Path, default=data_path("shards"), help="shards (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="throw away shards that other settings made")
    parser.add_argument(
        "--reject-budget", type=float, default=REJECT_BUDGET, help="largest share of rejected examples (%(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Build every selected dataset in turn."""
    args = parse_args()
    catalog = load_catalog(args.catalog)
    settings = catalog.stages[args.stage]
    make_processor = functools.partial(
        build_processor,
        ProcessorSettings(
            preset=catalog.preset,
            tokenizer_dir=str(args.raw / catalog.tokenizer),
            stage=args.stage,
            num_variants=settings.num_variants,
        ),
    )
    rows, failed = catalog.select(args.stage, args.datasets), []
    with worker_pool(make_processor, args.workers) as pool:
        for row in rows:
            since = time.perf_counter()
            try:
                if unfinished := unfinished_folders(row, args.raw):
                    raise MissingSourceError(f"{row.name}: the download of {', '.join(unfinished)} is not finished")
                index = build_dataset(
                    row,
                    args.stage,
                    settings,
                    make_processor,
                    raw=args.raw / row.folder,
                    out=args.out / args.stage / row.name,
                    pool=pool,
                    overwrite=args.overwrite,
                    reject_budget=args.reject_budget,
                )
            except (SourceError, BuildError) as error:  # the other datasets are none the worse for it
                hint = f"\n  {catalog.how_to_get(row)}" if isinstance(error, MissingSourceError) else ""
                print(f"build_shards: {error}{hint}", file=sys.stderr)
                failed.append(row.name)
                continue
            report(index, time.perf_counter() - since)
    if failed:
        sys.exit(f"build_shards: not built, {len(failed)} of {len(rows)}: {', '.join(failed)}")


def report(index: DatasetIndex, seconds: float) -> None:
    """Print one line on a finished dataset."""
    totals = index.totals
    print(
        f"{index.stage}/{index.dataset}: {totals.samples} samples, {totals.tokens:,} tokens, {totals.crops} crops, "
        f"{totals.bytes / 1e6:.1f} MB in {len(index.shards)} shards, {totals.rejects} left out, {seconds:.1f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"build_shards: {error}")
    except KeyboardInterrupt:
        sys.exit("build_shards: interrupted; the same command continues")
