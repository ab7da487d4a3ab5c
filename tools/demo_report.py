"""Report on the demo: the training of each stage, held-out accuracies beside chance, and paths of the results.

Example: `python tools/demo_report.py --out report.html`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from molmo2.config import data_path, load_recipe
from molmo2.eval.score_page import Stage, read_stage, render_report
from molmo2.pages import percent
from shards.command import run

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "demo"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of stage*.yaml (%(default)s)")
    parser.add_argument("--export", type=Path, default=data_path("runs/demo-export"), help="exported model")
    parser.add_argument("--out", type=Path, default=data_path("runs/demo-report.html"), help="(%(default)s)")
    return parser.parse_args()


def stages_table(stages: list[Stage]) -> Table:
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


def main() -> None:
    """Read the runs and the evaluation, write the report, print the tables."""
    args = parse_args()
    recipes = [load_recipe(path) for path in sorted(args.recipes.glob("stage*.yaml"))]
    if not recipes:
        raise ValueError(f"{args.recipes}: no stage*.yaml in this folder; correct --recipes")
    stages = [read_stage(recipe.run_dir) for recipe in recipes]
    file = recipes[-1].run_dir / "evaluation-demo.json"
    try:
        evaluation = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; run tools/evaluate.py --checkpoint {recipes[-1].name}") from None
    facts = {"checkpoint": evaluation["checkpoint"]}
    if args.export.is_dir():
        facts["exported model"] = str(args.export)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(render_report("nanoMolmo2 demo", stages, evaluation, facts), encoding="utf-8")
    table = Table(title="Held-out digits", title_justify="left")
    table.add_column("benchmark")
    for name in ("score", "chance", "target"):
        table.add_column(name, justify="right")
    for result in evaluation["results"]:
        table.add_row(result["name"], *(percent(result[key]) for key in ("score", "chance", "target")))
    console = Console()
    console.print(stages_table(stages))
    console.print(table)
    for name, value in {**facts, "report": str(args.out)}.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    run(main)
