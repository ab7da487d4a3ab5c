"""Preview the mixture of a recipe: shares asked for and drawn, epochs, and how full the packs are.

    python tools/preview_mixture.py recipes/demo/stage2.yaml
    python tools/preview_mixture.py recipes/demo/stage2.yaml --steps 1000 --set data.max_crops=64
    python tools/preview_mixture.py recipes/demo/stage2.yaml --ranks 2 8

It reads the indexes of the datasets and no samples, and needs no GPU. The figures are of the first --steps steps,
exactly as in training; epochs are of the whole run. With --ranks it also prints the share of the time in which so many
ranks would work and not wait for the slowest one, and the settings that change it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from molmo2.config import load_recipe
from molmo2.inspection.shares import mixture_lines
from shards.command import run


def main() -> None:
    """Print the preview of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file of a run")
    parser.add_argument("--steps", type=int, default=200, help="steps to plan, at most the recipe's (default: 200)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.seed=3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], metavar="N", help="numbers of ranks (GPUs)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    if any(ranks < 1 for ranks in arguments.ranks):
        parser.error(f"--ranks {' '.join(map(str, arguments.ranks))}: at least 1")
    print(
        "\n".join(mixture_lines(load_recipe(arguments.recipe, arguments.set), arguments.steps, worlds=arguments.ranks))
    )


if __name__ == "__main__":
    run(main)
