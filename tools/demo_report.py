"""Report on the demo: the training of each stage, held-out accuracies beside chance, and what to do next.

Example: `python tools/demo_report.py --out report.html`
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from molmo2.config import data_path, load_recipe
from molmo2.eval.score_tables import results_table
from molmo2.pages import curves, fill_template
from shards.atomic import write_atomic
from shards.command import run

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "demo"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of stage*.yaml (%(default)s)")
    parser.add_argument("--export", type=Path, default=data_path("runs/demo-export"), help="exported model")
    parser.add_argument("--out", type=Path, default=data_path("runs/demo-report.html"), help="(%(default)s)")
    parser.add_argument("--took", type=int, metavar="SECONDS", help="the time of the steps before, to print")
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A finished run: its `summary.json`, and the curve of its loss with a title."""

    summary: Mapping[str, Any]
    curves: Sequence[tuple[str, Markup]]


def read_finished(run_dir: Path) -> FinishedRun:
    """Read a run's summary and losses.

    Raises:
        ValueError: the run is missing or has not finished.
    """
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir}: no summary.json: the run has not finished; start its recipe again") from None
    from molmo2.training.metrics import read_log  # it imports torch, which takes seconds
    from molmo2.training.run import LOG_NAME

    losses = [{"step": line["step"], "loss": line["loss"]} for line in read_log(run_dir / LOG_NAME)]
    return FinishedRun(summary=summary, curves=curves(losses, ("loss",), f"{summary['name']}: "))


def report_page(stages: Sequence[FinishedRun], evaluation: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """The HTML page: stages in the order of training, the JSON of `tools/evaluate.py`, and facts to show first."""
    return fill_template(
        "demo/demo_report.html.jinja",
        title="nanoMolmo2 demo",
        facts=facts,
        evaluation=evaluation,
        shown="answers",
        stages=[stage.summary for stage in stages],
        curves=[curve for stage in stages for curve in stage.curves],
    )


def stages_table(stages: Sequence[FinishedRun]) -> Table:
    """A table of the training stages: steps, tokens, loss."""
    table = Table(title="Training", title_justify="left")
    table.add_column("stage")
    for name in ("steps", "tokens", "loss first -> last", "fill", "seconds"):
        table.add_column(name, justify="right")
    for stage in stages:
        s = stage.summary
        losses = f"{s['loss_first']:.3f} -> {s['loss_last']:.3f}"
        row = (str(s["steps"]), f"{s['tokens']:,}", losses, f"{s['fill']:.1%}", f"{s['seconds']:.0f}")
        table.add_row(f"{s['name']} ({s['stage']})", *row)
    return table


def next_steps(checkpoint: Path, report: Path) -> list[str]:
    """What a user of the demo can do next, with commands to paste in the current folder."""
    activate = [f"  source {_shown(Path(sys.prefix, 'bin/activate'))}"] if sys.prefix != sys.base_prefix else []
    return [
        "What to do next:",
        *activate,
        f"  open the report      {_shown(report)}",
        f"  chat with the model  python tools/chat.py --checkpoint {_shown(checkpoint)} --web",
        "  use your own data    python tools/new_dataset.py PATH --name mine --go",
        "  train a full Molmo2  docs/guide.md, with recipes/stage1.yaml to stage3.yaml",
    ]


def _shown(path: Path) -> str:
    """A path as it is typed in the current folder."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def main() -> None:
    """Read the runs and the evaluation, write the report, print the tables."""
    args = parse_args()
    recipes = [load_recipe(path) for path in sorted(args.recipes.glob("stage*.yaml"))]
    if not recipes:
        raise ValueError(f"{args.recipes}: no stage*.yaml in this folder; correct --recipes")
    stages = [read_finished(recipe.run_dir) for recipe in recipes]
    file = recipes[-1].run_dir / "evaluation-demo.json"
    try:
        evaluation = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; run tools/evaluate.py --checkpoint {recipes[-1].name}") from None
    facts = {"model": f"{evaluation['run']}, step {evaluation['step']}", "checkpoint": evaluation["checkpoint"]}
    if args.export.is_dir():
        facts["exported model"] = str(args.export)
    write_atomic(args.out, report_page(stages, evaluation, facts))
    console = Console()
    console.print(stages_table(stages))
    console.print(results_table("Held-out digits", evaluation["results"]))
    for name, value in facts.items():
        print(f"{name}: {value}")
    if args.took is not None:
        print(f"the demo took {args.took} s before this report")
    print("\n".join(["", *next_steps(args.export if args.export.is_dir() else recipes[-1].run_dir, args.out)]))


if __name__ == "__main__":
    run(main)
