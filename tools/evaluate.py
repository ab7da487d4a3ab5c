"""Evaluate a checkpoint on held-out data.

    python tools/build_shards.py --stage eval --catalog demo
    python tools/evaluate.py --checkpoint demo-stage3 --benchmarks demo
    python tools/evaluate.py --checkpoint OWNER/NAME --benchmarks image,next-qa --limit 200
    python tools/evaluate.py --checkpoint demo-stage3 --loss demo-image-qa,demo-video-qa
    python tools/evaluate.py --checkpoint mine --catalog mine.yaml
    python tools/evaluate.py --list
    torchrun --nproc-per-node 8 tools/evaluate.py --checkpoint stage3 --benchmarks video

Prints a table with scores and chance levels, and writes it next to the run's checkpoints: as JSON with some answers,
and as an HTML page with the worst answers. Answers are stored, so a killed evaluation resumes when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from molmo2.config import data_path
from molmo2.eval.benchmarks import (
    BATCH_SIZE,
    STAGE,
    SUITES,
    Suite,
    choose,
    is_built,
    load_suites,
    own_suite,
    reason_left_out,
)
from molmo2.eval.score_tables import list_lines, results_table, scores_page
from molmo2.model.presets import PRECISION_NAMES
from shards.atomic import write_atomic
from shards.catalog import load_catalog
from shards.command import run

if TYPE_CHECKING:  # torch takes seconds to load, so what needs it waits until the command line has been read
    from molmo2.eval.runner import Outcome, Ranks, Subject
    from molmo2.weights.load import OpenedModel

LOSS_CATALOGS = ("demo", "molmo2-eval", "molmo2")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        help="a run or a checkpoint of it (name or path), or an exported or released model (directory, OWNER/NAME)",
    )
    parser.add_argument(
        "--benchmarks",
        help=f"suites ({', '.join(SUITES)}) and single benchmarks, commas between (demo, or none by --loss)",
    )
    parser.add_argument("--loss", help="datasets with rows or shards of stage eval, commas between: their mean loss")
    parser.add_argument(
        "--catalog", help="a catalog of your own: its metrics and held-out losses, or those of --benchmarks and --loss"
    )
    parser.add_argument("--list", action="store_true", help="print all benchmarks, or those of --catalog, and stop")
    parser.add_argument("--limit", type=int, help="at most so many samples (images, videos) of each dataset (all)")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="questions at once (%(default)s)")
    parser.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint for statement F1 (none)")
    parser.add_argument("--judge-model", help="the judge's model (the first one that the endpoint lists)")
    parser.add_argument("--shards", default=str(data_path("shards")), help="a folder or s3://… (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (evaluation-BENCHMARKS.json in the run's directory)")
    parser.add_argument("--device", help="(this rank's GPU if there is one, else cpu)")
    parser.add_argument("--precision", choices=PRECISION_NAMES, help="(bf16 on a GPU, fp32 on a CPU)")
    args = parser.parse_args()
    if not args.checkpoint and not args.list:
        parser.error("--checkpoint is required (--list prints what a model can be evaluated on)")
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: ask at least one question")
    if not args.benchmarks and not args.loss and not args.catalog:
        args.benchmarks = "demo"
    return args


def default_device() -> str:
    """This rank's GPU, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group of the launcher; without a launcher this process is alone."""
    import torch.distributed as dist

    from molmo2.eval.runner import Ranks

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    # Answers are exchanged through files; the group is only a barrier, which waits for the slowest rank.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))

    def wait() -> None:
        dist.barrier()

    try:
        yield Ranks(rank=dist.get_rank(), world=world, wait=wait)
    finally:
        dist.destroy_process_group()


def run_suites(
    suites: list[Suite], args: argparse.Namespace, subject: Subject, answers: Path, digest: str, ranks: Ranks
) -> Outcome:
    """Evaluate all suites and merge their outcomes."""
    from molmo2.eval.runner import Outcome, run_suite

    merged = Outcome()
    for suite in suites:
        outcome = run_suite(suite, args.shards, subject, answers, digest, limit=args.limit, ranks=ranks)
        merged.results.extend(outcome.results)
        merged.skipped.update(outcome.skipped)
    return merged


def loss_catalogs(names: list[str], shards: str, catalogs: tuple[str, ...] = LOSS_CATALOGS) -> dict[str, str]:
    """The catalog in which each of these datasets has an evaluation row; "" for one that is built, but has none.

    Raises:
        ValueError: a dataset is not built, and has no evaluation row in any catalog.
    """
    rows = {name: {row.name for row in load_catalog(name).rows if STAGE in row.stages} for name in catalogs}
    homes = {name: next((catalog for catalog in rows if name in rows[catalog]), "") for name in names}
    for name, home in homes.items():
        if home or is_built(shards, name):
            continue
        if reason := reason_left_out(name):
            raise ValueError(f"--loss {name}: {reason}")
        known = ", ".join(sorted(set().union(*rows.values())))
        where = f"{', '.join(rows)}, nor built in {shards.rstrip('/')}/{STAGE}"
        raise ValueError(f"--loss {name}: no evaluation row in {where}; rows: {known}")
    return homes


def run_losses(
    catalogs: dict[str, str],
    args: argparse.Namespace,
    subject: Subject,
    answers: Path,
    digest: str,
    ranks: Ranks,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    """The losses of datasets (dataset -> catalog), on rank 0; datasets that are not built are added to `skipped`."""
    from molmo2.eval.losses import held_out_loss
    from molmo2.eval.runner import NotBuiltError

    losses = []
    for name, catalog in catalogs.items():
        try:
            loss = held_out_loss(name, catalog, args.shards, subject, answers, digest, limit=args.limit, ranks=ranks)
        except NotBuiltError as error:
            skipped[f"loss of {name}"] = str(error)
            continue
        losses.extend([loss] if loss else [])
    return losses


def show(title: str, document: dict[str, Any]) -> None:
    """Print the table, the losses, and what was skipped."""
    console = Console()
    if document["results"]:
        console.print(results_table(f"{title}, held-out data", document["results"]))
    for loss in document["losses"]:
        counts = f"{loss['num_samples']} samples, {loss['num_left_out']} left out"
        print(f"loss of {loss['dataset']}: {loss['loss']:.4f} ({counts})")
    for name, reason in document["skipped"].items():
        print(f"skipped {name}: {reason}")


def open_subject(opened: OpenedModel, args: argparse.Namespace) -> Subject:
    """The model on its device, and its processor."""
    import torch

    from molmo2.eval.runner import Subject
    from molmo2.model.molmo2 import Molmo2
    from molmo2.processing.contract import ProcessorSettings
    from molmo2.processing.processor import build_processor

    settings = ProcessorSettings(
        preset=opened.config.name, tokenizer_dir=str(opened.tokenizer_dir), stage=STAGE, num_variants=1
    )
    device = torch.device(args.device or default_device())
    model = Molmo2.for_inference(opened.config, opened.weights, device, args.precision)
    return Subject(model=model, processor=build_processor(settings), device=device, batch_size=args.batch_size)


def main() -> None:
    """Find what to evaluate, and evaluate it on every rank of the launcher."""
    args = parse_args()
    if args.list:
        print_list(args.catalog, args.shards)
        return
    suites, catalogs = what_to_evaluate(args)
    if args.judge and not any(benchmark.judged for suite in suites for benchmark in suite.benchmarks):
        raise ValueError(f"--judge {args.judge}: none of the chosen benchmarks is judged; --list marks those that are")
    with process_group() as ranks:
        evaluate(args, suites, catalogs, ranks)


def print_list(catalog: str | None, shards: str) -> None:
    """Print the benchmarks of all suites, or those and the held-out datasets of a catalog of one's own."""
    suites, loss_only = load_suites(), []
    if catalog is not None:
        suites = {Path(catalog).stem: own_suite(catalog)}
        scored = {benchmark.dataset for suite in suites.values() for benchmark in suite.benchmarks}
        loss_only = [row.name for row in load_catalog(catalog).require(STAGE) if row.name not in scored]
    for line in list_lines(suites, loss_only, shards):
        print(line)


def what_to_evaluate(args: argparse.Namespace) -> tuple[list[Suite], dict[str, str]]:
    """The suites of benchmarks, and the datasets of which the loss is wanted with their catalogs.

    Raises:
        ValueError: a name is unknown, or a catalog of one's own has nothing that is held out.
    """
    losses = [name.strip() for name in args.loss.split(",")] if args.loss else []
    if args.catalog is None:
        return choose(args.benchmarks) if args.benchmarks else [], loss_catalogs(losses, args.shards)
    if not args.benchmarks and not args.loss:
        losses = [row.name for row in load_catalog(args.catalog).require(STAGE)]
    suite = own_suite(args.catalog, args.benchmarks) if args.benchmarks or not args.loss else Suite(args.catalog, ())
    return [suite], loss_catalogs(losses, args.shards, (args.catalog,))


def evaluate(args: argparse.Namespace, suites: list[Suite], catalogs: dict[str, str], ranks: Ranks) -> None:
    """Load the model, evaluate the suites and losses; rank 0 prints and writes the results."""
    from molmo2.eval.answers import weights_digest
    from molmo2.eval.judge import Judge
    from molmo2.weights.load import open_model

    since = time.perf_counter()
    opened = open_model(args.checkpoint)
    subject = open_subject(opened, args)
    # The results of a run are written beside its checkpoints, those of a model into its own directory.
    folder = opened.path.parent.parent if "run" in opened.origin else opened.path
    whole = Path(args.catalog).stem if args.catalog and not args.loss else "loss"
    label = (args.benchmarks or whole).replace(" ", "").replace(",", "+")
    out = args.out or folder / f"evaluation-{label}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    answers, digest = out.parent / "answers", weights_digest(opened.weights)
    if args.judge and ranks.rank == 0:  # which computes the scores
        judge = Judge(args.judge, out.parent / "judgements.jsonl", args.judge_model)
        suites = [replace(s, benchmarks=tuple(b.with_judge(judge) for b in s.benchmarks)) for s in suites]
    outcome = run_suites(suites, args, subject, answers, digest, ranks)
    losses = run_losses(catalogs, args, subject, answers, digest, ranks, outcome.skipped)
    if ranks.rank:
        return
    document: dict[str, Any] = {
        "benchmarks": args.benchmarks,
        "checkpoint": str(opened.path),
        "precision": subject.precision,
        **{key: opened.origin[key] for key in ("run", "step") if key in opened.origin},
        "seconds": round(time.perf_counter() - since, 1),
        "results": outcome.results,
        "losses": losses,
        "skipped": outcome.skipped,
    }
    title = f"{opened.origin['run']}, step {opened.origin['step']}" if "run" in opened.origin else args.checkpoint
    show(title, document)
    if not outcome.results and not losses:
        raise ValueError("nothing was evaluated: everything was skipped for the reasons above")
    write_atomic(out, json.dumps(document, indent=1) + "\n")
    write_atomic(out.with_suffix(".html"), scores_page(f"{title}: evaluation", document))
    print(f"written to {out} and {out.with_suffix('.html').name} ({document['seconds']} s)")


if __name__ == "__main__":
    run(main)
