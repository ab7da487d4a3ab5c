"""Preview the mixture of a recipe: shares asked for and drawn, epochs, and how full the packs are.

    python tools/preview_mixture.py recipes/demo/stage2.yaml
    python tools/preview_mixture.py recipes/demo/stage2.yaml --steps 1000 --set data.max_crops=64

It reads the indexes of the datasets and no samples, and needs neither torch nor a GPU. The figures are of the first
--steps steps, exactly as in training; epochs are of the whole run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from molmo2.config import Recipe, load_recipe
from molmo2.inspection.shares import DrawCounts, Share, plan_and_draw, shares_of
from shards.command import run


def table(shares: list[Share]) -> list[str]:
    """One line per dataset, by group in the recipe's order."""
    width = max(7, *(len(share.name) for share in shares))
    lines = [
        f"{'dataset':{width}} {'samples':>10} {'asked %':>8} {'drawn %':>8} {'tokens %':>8} "
        f"{'tokens each':>11} {'crops each':>10} {'epochs':>8}"
    ]
    for group, members in itertools.groupby(shares, key=lambda share: share.group):
        listed = list(members)
        lines.append(f"{group} ({sum(share.asked for share in listed):.2%})")
        lines += [
            f"{share.name:{width}} {share.size:>10,} {100 * share.asked:>8.2f} {100 * share.drawn:>8.2f} "
            f"{100 * share.tokens:>8.2f} {share.tokens_each:>11,.0f} {share.crops_each:>10.1f} {share.epochs:>8.2f}"
            for share in listed
        ]
    return lines


def summary(recipe: Recipe, drawn: DrawCounts) -> list[str]:
    """The fill of the packs, and the totals of the whole run."""
    data, samples = recipe.data, sum(drawn.samples)
    token_fill = sum(drawn.tokens) / (drawn.packs * data.sequence_length)
    crop_fill = sum(drawn.crops) / max(1, drawn.packs * data.max_crops)
    whole = recipe.train.steps / drawn.steps
    lines = [
        f"{drawn.steps} steps of {recipe.train.packs_per_step} packs, {samples / drawn.packs:.2f} samples a pack",
        f"fill: {token_fill:.2%} of {data.sequence_length:,} tokens (emptiest pack "
        f"{drawn.fewest_tokens / data.sequence_length:.1%}), {crop_fill:.2%} of {data.max_crops} crops",
        f"whole run: {recipe.train.steps:,} steps, about {samples * whole:,.0f} samples and "
        f"{sum(drawn.tokens) * whole:,.0f} tokens",
    ]
    if crop_fill > token_fill and token_fill < 0.97:
        lines.append("crops run out before tokens do: a higher data.max_crops would leave less padding")
    return lines


def preview(recipe: Recipe, num_steps: int) -> list[str]:
    """The lines to print."""
    plan, drawn = plan_and_draw(recipe, num_steps)
    return [*table(shares_of(recipe, plan, drawn)), "", *summary(recipe, drawn)]


def main() -> None:
    """Print the preview of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file of a run")
    parser.add_argument("--steps", type=int, default=200, help="steps to plan, at most the recipe's (default: 200)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.seed=3")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    print("\n".join(preview(load_recipe(arguments.recipe, arguments.set), arguments.steps)))


if __name__ == "__main__":
    run(main)
