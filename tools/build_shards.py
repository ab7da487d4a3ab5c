"""Build the shards of a stage from raw data.

    python tools/build_shards.py --stage sft
    python tools/build_shards.py --stage sft --catalog demo --datasets demo-points demo-chat --workers 4
    srun --ntasks 8 python tools/build_shards.py --stage sft --workers 16    # tasks 0/8 to 7/8; then once without srun

Finished datasets are kept, and a killed build resumes with the missing shards. Task r/N builds every N-th shard of each
dataset from r on; when all tasks have finished, one run without --task writes the indexes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from molmo2.config import data_path
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.processor import build_processor
from shards.build.builder import REJECT_BUDGET, Built, build_dataset
from shards.build.claim import BuildError
from shards.build.oddities import SHARED, shared_questions
from shards.build.pool import worker_pool
from shards.build.rebuild import rows_to_build
from shards.build.rejects import kinds
from shards.catalog import STAGES, Row, Stage, load_catalog
from shards.command import run
from shards.download.manifest import unfinished_folders
from shards.format import REJECTS_NAME, REPORT_NAME
from shards.machine import usable_cores
from shards.sources.parquet import MissingSourceError, SourceError
from shards.storage.base import Storage
from shards.storage.open import open_storage
from shards.stream.dataset import open_dataset
from shards.stream.fill import expected_fill


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument(
        "--catalog", "--source", default="molmo2", help="name of a catalog, or a YAML file of your own (%(default)s)"
    )
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these (all of the stage)")
    parser.add_argument("--raw", type=Path, default=data_path("raw"), help="raw data (%(default)s)")
    parser.add_argument("--out", default=str(data_path("shards")), help="shards, a folder or s3://… (%(default)s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (%(default)s)")
    parser.add_argument(
        "--task",
        type=task_of,
        metavar="r/N",
        help="build only every N-th shard from r on; 0/1 is all (default: SLURM_ARRAY_TASK_*, SLURM_PROCID or RANK)",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="build only those missing shards that failed before"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete shards that were built with other settings")
    parser.add_argument(
        "--reject-budget",
        type=float,
        default=REJECT_BUDGET,
        help="most rejects of one cause (media, values) per group of rows (%(default)s)",
    )
    parser.add_argument(
        "--verify-media",
        action="store_true",
        help="record the sha256 of media files, and find changed files by it and not by size and time",
    )
    return parser.parse_args()


def task_of(text: str) -> tuple[int, int]:
    """Parse "r/N" as (r, N).

    Raises:
        ArgumentTypeError: the text has another form, or r is not in 0..N-1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: write r/N with r in 0..N-1, such as 0/4")
    return int(match[1]), int(match[2])


def task_from(variables: Mapping[str, str]) -> tuple[int, int]:
    """The task (r, N) of this process from the launcher's environment variables; (0, 1) without a launcher.

    Raises:
        ValueError: a job array has gaps, so that no job would build the shards of the missing numbers.
    """
    first = int(variables.get("SLURM_ARRAY_TASK_MIN", 0))
    if "SLURM_ARRAY_TASK_ID" in variables:
        last, number = int(variables["SLURM_ARRAY_TASK_MAX"]), int(variables["SLURM_ARRAY_TASK_COUNT"])
        if number != last - first + 1:
            raise ValueError(f"array of {number} jobs numbered {first} to {last}: give --task r/N instead")
        return int(variables["SLURM_ARRAY_TASK_ID"]) - first, number
    for rank, number_name in (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE")):
        if rank in variables and number_name in variables:
            return int(variables[rank]), int(variables[number_name])
    return 0, 1


def main() -> None:
    """Build every selected dataset in turn."""
    args = parse_args()
    task = args.task or task_from(os.environ)
    catalog = load_catalog(args.catalog)
    rows, failed = rows_to_build(catalog, args.stage, args.datasets, args.out.rstrip("/")), list[str]()
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
    with worker_pool(make_processor, args.workers) as pool:
        for row, share in rows:
            if share:
                print(f"{args.stage}/{row.name}: built again, narrower limits changed {share:.1%} of its samples")
            out, since = f"{args.out.rstrip('/')}/{args.stage}/{row.name}", time.perf_counter()
            try:
                if unfinished := unfinished_folders(catalog, row, args.raw):
                    raise MissingSourceError(f"{row.name}: the download of {', '.join(unfinished)} has not finished")
                built = build_dataset(
                    row,
                    args.stage,
                    settings,
                    make_processor,
                    raw=args.raw / row.folder,
                    out=out,
                    pool=pool,
                    task_of=task,
                    overwrite=args.overwrite,
                    retry_failed=args.retry_failed,
                    reject_budget=args.reject_budget,
                    verify_media=args.verify_media,
                )
            except (SourceError, BuildError, OSError) as error:  # the other datasets are still built
                hint = f"\n  {catalog.how_to_get(row)}" if isinstance(error, MissingSourceError) else ""
                print(f"build_shards: {error}{hint}", file=sys.stderr)
                failed.append(row.name)
                continue
            write_report_json(f"{args.stage}/{row.name}", built, task, out, time.perf_counter() - since)
            if built.index is not None:
                count_shared_questions(row, args.stage, args.out.rstrip("/"))
    if failed:
        sys.exit(f"build_shards: not built, {len(failed)} of {len(rows)}: {', '.join(failed)}")


def write_report_json(label: str, built: Built, task: tuple[int, int], out: str, seconds: float) -> None:
    """Print a summary of a dataset: its size, speed, and the reasons of rejects; for a task r/N only the speed.

    For a finished dataset the summary is also written to `report.json`, of which pages show the oddities.
    """
    speed = f"{built.num_made} shards in {seconds:.1f} s"
    if built.num_made:
        speed += f", {built.made['samples'] / seconds:.1f} samples/s"
    if built.index is None:
        line = f"task {task[0]}/{task[1]}: {speed}; {built.num_kept} were finished before"
        print(f"{label}: {line}; the dataset is incomplete until a run without --task writes its index")
        return
    totals, storage = built.index.totals, open_storage(out)
    rejects = [json.loads(line) for line in storage.read(REJECTS_NAME).splitlines()]
    reasons, left_out = kinds(rejects), {(reject["file"], reject["row"]) for reject in rejects}
    made: dict[str, float] | None = {
        "shards": built.num_made,
        "seconds": seconds,
        "samples_per_second": built.made["samples"] / seconds,
    }
    if not built.num_made:  # the figures of the run that made the shards stay
        made = earlier_figures(storage) or made
    summary = {**totals.model_dump(), **built.index.fitted, "shards": len(built.index.shards)}
    summary |= {"left_out": {kind.reason: kind.number for kind in reasons}, "made": made}
    summary |= {"unmatched_skips": list(built.unmatched_skips), "oddities": built.oddities}
    fill = expected_fill(open_dataset(*out.rstrip("/").rsplit("/", 1)))
    summary |= {"fill": None if fill is None else fill._asdict()}
    storage.write(REPORT_NAME, (json.dumps(summary, indent=1) + "\n").encode())
    print(
        f"{label}: {totals.samples} samples (message trees) of {totals.annotations} annotations, "
        f"{totals.tokens:,} tokens, {totals.crops} crops, {totals.frames} frames, {totals.bytes / 1e9:.3f} GB in "
        f"{len(built.index.shards)} shards, {len(left_out)} rows left out or in part; made {speed}"
    )
    if any(built.index.fitted.values()):
        print(
            "  to fit the limits: {shrunk} samples have fewer crops or frames, {parts} are parts of a larger tree, "
            "{fewer_images} have the first of more images, {clips} show a part of their video, "
            "{lost_points} lost points with it".format(**built.index.fitted)
        )
    if fill is not None:
        print(f"  {fill.text}")
    for kind in reasons[:5]:
        print(f"  left out: {kind.number} x {kind.reason}\n    first: {kind.example}")
    for text, oddity in built.oddities.items():
        print(f"  used, but look: {oddity['number']} {text} (first: {oddity['first']})")
    if unmatched := built.unmatched_skips:
        print(f"  {len(unmatched)} items of `skip` match no row; first: {unmatched[0].removeprefix('skipped: ')}")


def count_shared_questions(row: Row, stage: Stage, root: str) -> None:
    """Print how many samples of a training stage ask what held-out samples ask, and add it to that stage's report.

    It is counted when both stages are built, so after the build of either of them.
    """
    for trained in row.stages if "eval" in row.stages else ():
        if trained == "eval" or stage not in {trained, "eval"}:
            continue
        storage = open_storage(f"{root}/{trained}/{row.name}")
        try:
            report = json.loads(storage.read(REPORT_NAME))
        except FileNotFoundError:
            continue
        report.setdefault("oddities", {}).pop(SHARED, None)
        if keys := shared_questions(storage, open_storage(f"{root}/eval/{row.name}")):
            report["oddities"][SHARED] = {"number": len(keys), "first": keys[0], "shown": []}
            print(f"{trained}/{row.name}: used, but look: {len(keys)} {SHARED} (first: {keys[0]})")
        storage.write(REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())


def earlier_figures(storage: Storage) -> dict[str, float] | None:
    """The section `made` of the report of an earlier run; None if there is none."""
    try:
        figures: dict[str, float] | None = json.loads(storage.read(REPORT_NAME)).get("made")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return figures


if __name__ == "__main__":
    run(main)
