"""Evaluate a checkpoint on held-out data.

    python tools/evaluate.py --checkpoint demo-stage3 --benchmarks demo
    python tools/evaluate.py --checkpoint data/runs/demo-stage2/checkpoints/step-00000600 --limit 50

Prints a table beside the chance levels and writes it, with some answers, as JSON next to the run's checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from molmo2.config import data_path
from molmo2.eval.benchmarks import SUITES
from molmo2.eval.report import percent
from molmo2.eval.runner import evaluate
from molmo2.model.molmo2 import Molmo2
from molmo2.open_model import open_model
from molmo2.processing import ProcessorSettings, build_processor
from shards.catalog import load_catalog


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run or a checkpoint of it (name or path), or an exported or released model (directory, OWNER/NAME)",
    )
    parser.add_argument("--benchmarks", default="demo", choices=sorted(SUITES))
    parser.add_argument("--limit", type=int, help="at most so many questions of each benchmark (all)")
    parser.add_argument("--raw", type=Path, default=data_path("raw"), help="raw data (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (evaluation-BENCHMARKS.json in the run's directory)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: ask at least one question")
    return args


def results_table(title: str, results: list[dict[str, Any]]) -> Table:
    """The table that is printed."""
    table = Table(title=title, title_justify="left")
    for name in ("benchmark", "metric"):
        table.add_column(name)
    for name in ("questions", "score", "chance", "target"):
        table.add_column(name, justify="right")
    for result in results:
        shown = (percent(result[key]) for key in ("score", "chance", "target"))
        table.add_row(result["name"], result["metric"], str(result["num_questions"]), *shown)
    return table


def main() -> None:
    """Load, ask, score, write."""
    args = parse_args()
    since = time.perf_counter()
    suite = SUITES[args.benchmarks]
    catalog = load_catalog(suite.catalog)
    opened = open_model(args.checkpoint)
    settings = ProcessorSettings(
        preset=opened.config.name, tokenizer_dir=str(opened.tokenizer_dir), stage="eval", num_variants=1
    )
    model = Molmo2.with_weights(opened.config, opened.weights)
    processor = build_processor(settings)
    results = evaluate(suite, catalog, args.raw, model, processor, limit=args.limit, device=torch.device(args.device))
    # Beside the checkpoints of a run; in a model's own directory.
    folder = opened.path.parent.parent if "run" in opened.origin else opened.path
    out = args.out or folder / f"evaluation-{args.benchmarks}.json"
    document: dict[str, Any] = {
        "benchmarks": args.benchmarks,
        "checkpoint": str(opened.path),
        **{key: opened.origin[key] for key in ("run", "step") if key in opened.origin},
        "seconds": round(time.perf_counter() - since, 1),
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, out)
    title = f"{opened.origin['run']}, step {opened.origin['step']}" if "run" in opened.origin else args.checkpoint
    Console().print(results_table(f"{title}, held-out data", results))
    print(f"written to {out} ({document['seconds']} s)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: {error}")
