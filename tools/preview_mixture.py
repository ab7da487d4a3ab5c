"""Show what a recipe will train on: shares asked for and drawn, epochs, and how full the packs are.

    python tools/preview_mixture.py recipes/demo/stage2.yaml
    python tools/preview_mixture.py recipes/demo/stage2.yaml --steps 1000 --set data.max_crops=64

Reads the datasets' indexes and no sample, and needs neither torch nor a GPU. Figures are those of the first --steps
steps, which training will see exactly so; epochs are those of the whole run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from molmo2.config import Recipe, RecipeError, load_recipe
from shards.mixture import SCALE
from shards.plan import Cursor, Plan, open_plan


@dataclass(slots=True)
class Drawn:
    """Sums over some steps; the lists go by the number of the dataset in the plan."""

    steps: int
    packs: int = 0
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    fewest_tokens: int = sys.maxsize  # of a pack


def draw_steps(plan: Plan, num_steps: int) -> Drawn:
    """Plan the first steps and count what they hold."""
    zeros = [0] * len(plan.datasets)
    drawn = Drawn(num_steps, samples=zeros.copy(), tokens=zeros.copy(), crops=zeros.copy())
    cursor = Cursor()
    for _ in tqdm(range(num_steps), desc="plan", unit="step", leave=False):
        step = plan.step(cursor)
        for pack in step.packs:
            for draw in pack.draws:
                drawn.samples[draw.dataset] += 1
                drawn.tokens[draw.dataset] += draw.num_tokens
                drawn.crops[draw.dataset] += draw.num_crops
            drawn.fewest_tokens = min(drawn.fewest_tokens, sum(draw.num_tokens for draw in pack.draws))
        drawn.packs += len(step.packs)
        cursor = step.cursor
    return drawn


def table(recipe: Recipe, plan: Plan, drawn: Drawn) -> list[str]:
    """One line a dataset, by group in the recipe's order."""
    numbers = {dataset.name: number for number, dataset in enumerate(plan.datasets)}
    width = max(7, *map(len, numbers))
    lines = [
        f"{'dataset':{width}} {'samples':>10} {'asked %':>8} {'drawn %':>8} {'tokens %':>8} "
        f"{'tokens each':>11} {'crops each':>10} {'epochs':>8}"
    ]
    total, tokens = sum(drawn.samples), sum(drawn.tokens)
    for group, spec in recipe.data.mixture.groups.items():
        asked = sum(plan.weights[name] for name in spec.datasets) / SCALE
        lines.append(f"{group} ({asked:.2%})")
        for name in spec.datasets:
            i = numbers[name]
            size, count = len(plan.datasets[i]), drawn.samples[i]
            epochs = plan.weights[name] / SCALE * total / drawn.steps * recipe.train.steps / size
            lines.append(
                f"{name:{width}} {size:>10,} {100 * plan.weights[name] / SCALE:>8.2f} {100 * count / total:>8.2f} "
                f"{100 * drawn.tokens[i] / tokens:>8.2f} {drawn.tokens[i] / max(1, count):>11,.0f} "
                f"{drawn.crops[i] / max(1, count):>10.1f} {epochs:>8.2f}"
            )
    return lines


def summary(recipe: Recipe, drawn: Drawn) -> list[str]:
    """How full the packs are, and what the whole run comes to."""
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
    plan = open_plan(recipe.roots, recipe.data.mixture, recipe.plan_settings)
    drawn = draw_steps(plan, min(num_steps, recipe.train.steps))
    return [*table(recipe, plan, drawn), "", *summary(recipe, drawn)]


def main() -> int:
    """Parse, preview, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file of a run")
    parser.add_argument("--steps", type=int, default=200, help="steps to plan, at most the recipe's (default: 200)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.seed=3")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least 1")
    try:
        lines = preview(load_recipe(arguments.recipe, arguments.set), arguments.steps)
    except (RecipeError, ValueError, OSError) as error:
        print(f"preview_mixture: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
