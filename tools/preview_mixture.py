"""Preview the mixture of a recipe: shares asked for and drawn, epochs, how full packs are, and what is read for them.

    python tools/preview_mixture.py recipes/demo/stage2.yaml
    python tools/preview_mixture.py recipes/demo/stage2.yaml --steps 1000 --set data.max_crops=64
    python tools/preview_mixture.py recipes/demo/stage2.yaml --ranks 2 8
    python tools/preview_mixture.py recipes/demo/stage2.yaml --ranks 8 --step-seconds 2.5

It reads the indexes of the datasets and no samples, and needs no GPU. The figures are of the first --steps steps,
exactly as in training; epochs are of the whole run. With --ranks it also prints the share of the time in which so many
ranks would work and not wait for the slowest one, the settings that change it, and what each rank reads in a step; with
--step-seconds also per second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from molmo2.config import load_recipe
from molmo2.inspection.shares import mixture_lines, plan_and_draw
from molmo2.inspection.storage_load import storage_lines
from shards.command import run


def main() -> None:
    """Print the preview of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file of a run")
    parser.add_argument("--steps", type=int, default=200, help="steps to plan, at most the recipe's (default: 200)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.seed=3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], metavar="N", help="numbers of ranks (GPUs)")
    parser.add_argument("--step-seconds", type=float, metavar="S", help='seconds of a step: "seconds" in log.jsonl')
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    if any(ranks < 1 for ranks in arguments.ranks):
        parser.error(f"--ranks {' '.join(map(str, arguments.ranks))}: at least 1")
    if arguments.step_seconds is not None and not arguments.step_seconds > 0:
        parser.error(f"--step-seconds {arguments.step_seconds}: above 0")
    recipe = load_recipe(arguments.recipe, arguments.set)
    plan, drawn = plan_and_draw(recipe, arguments.steps)
    lines = mixture_lines(recipe, plan, drawn, arguments.ranks)
    print("\n".join([*lines, "", *storage_lines(recipe, plan, drawn, arguments.ranks, arguments.step_seconds)]))


if __name__ == "__main__":
    run(main)
