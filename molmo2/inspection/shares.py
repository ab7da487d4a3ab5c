"""Shares of the datasets in a recipe's mixture and in the draws of its first steps, as numbers and as lines of text.

It reads indexes and needs no torch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from molmo2.config import Recipe
from shards.stream.mixture import SCALE
from shards.stream.plan import Cursor, PackSizes, Plan, open_plan

TEXTS = 10_000  # samples without visuals that are kept for a mean


@dataclass(slots=True)
class DrawCounts:
    """Sums over the first steps; entry i of a list is for dataset i of the plan."""

    steps: int
    packs: int = 0
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)  # as stored
    text_samples: int = 0  # samples without visuals, and their bytes
    text_bytes: int = 0
    fewest_tokens: int = sys.maxsize  # tokens of the pack with the fewest
    sizes: list[list[PackSizes]] = field(default_factory=list)  # of the packs of each step


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One dataset of a mixture.

    Attributes:
        size: samples in the dataset.
        asked, drawn, tokens: fractions: the recipe's share of draws, the share in the first steps, and the share of
            their tokens.
        tokens_each, crops_each: mean numbers of tokens and crops per draw.
        steps_per_epoch: steps in which every sample of the dataset is drawn once.
        epochs: number of epochs of the dataset in the whole run.
    """

    group: str
    name: str
    size: int
    asked: float
    drawn: float
    tokens: float
    tokens_each: float
    crops_each: float
    steps_per_epoch: float
    epochs: float


def draw_steps(plan: Plan, num_steps: int) -> DrawCounts:
    """Plan the first steps and count their packs, samples, tokens and crops."""
    zeros = [0] * len(plan.datasets)
    drawn = DrawCounts(num_steps, samples=zeros.copy(), tokens=zeros.copy(), crops=zeros.copy(), bytes=zeros.copy())
    cursor = Cursor()
    for _ in tqdm(range(num_steps), desc="plan", unit="step", leave=False):
        step = plan.step(cursor)
        for pack in step.packs:
            for draw in pack.draws:
                drawn.samples[draw.dataset] += 1
                drawn.tokens[draw.dataset] += draw.num_tokens
                drawn.crops[draw.dataset] += draw.num_crops
                drawn.bytes[draw.dataset] += draw.span
                if not draw.num_crops:
                    drawn.text_samples += 1
                    drawn.text_bytes += draw.span
        sizes = [pack.sizes for pack in step.packs]
        drawn.fewest_tokens = min(drawn.fewest_tokens, *(size.tokens for size in sizes))
        drawn.sizes.append(sizes)
        drawn.packs += len(step.packs)
        cursor = step.cursor
    return drawn


def shares_of(recipe: Recipe, plan: Plan, drawn: DrawCounts) -> list[Share]:
    """The datasets of a mixture in the recipe's order."""
    numbers = {dataset.name: number for number, dataset in enumerate(plan.datasets)}
    total, tokens = sum(drawn.samples), sum(drawn.tokens)
    shares = []
    for group, spec in recipe.data.drawn_mixture.groups.items():
        for name in spec.datasets:
            i = numbers[name]
            asked, count, size = plan.weights[name] / SCALE, drawn.samples[i], len(plan.datasets[i])
            steps_per_epoch = size / (asked * total / drawn.steps)
            share = Share(
                group=group,
                name=name,
                size=size,
                asked=asked,
                drawn=count / total,
                tokens=drawn.tokens[i] / tokens,
                tokens_each=drawn.tokens[i] / max(1, count),
                crops_each=drawn.crops[i] / max(1, count),
                steps_per_epoch=steps_per_epoch,
                epochs=recipe.train.steps / steps_per_epoch,
            )
            shares.append(share)
    return shares


def share_table(shares: list[Share]) -> list[str]:
    """One line per dataset, by group in the recipe's order."""
    width = max(7, *(len(share.name) for share in shares))
    lines = [
        f"{'dataset':{width}} {'samples':>10} {'asked %':>8} {'drawn %':>8} {'tokens %':>8} "
        f"{'tokens each':>11} {'crops each':>10} {'steps/epoch':>11} {'epochs':>8}"
    ]
    for group, members in itertools.groupby(shares, key=lambda share: share.group):
        listed = list(members)
        lines.append(f"{group} ({sum(share.asked for share in listed):.2%})")
        lines += [
            f"{share.name:{width}} {share.size:>10,} {100 * share.asked:>8.2f} {100 * share.drawn:>8.2f} "
            f"{100 * share.tokens:>8.2f} {share.tokens_each:>11,.0f} {share.crops_each:>10.1f} "
            f"{share.steps_per_epoch:>11,.1f} {share.epochs:>8.2f}"
            for share in listed
        ]
    return lines


def draw_summary(recipe: Recipe, drawn: DrawCounts) -> list[str]:
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


def mixture_lines(recipe: Recipe, plan: Plan, drawn: DrawCounts, worlds: Sequence[int] = ()) -> list[str]:
    """Lines to print: the table and the summary of a recipe's first steps.

    `worlds`: numbers of ranks whose balance is printed too.
    """
    lines = [*share_table(shares_of(recipe, plan, drawn)), "", *draw_summary(recipe, drawn)]
    if worlds:
        from molmo2.inspection.balance import balance_lines  # imported here because it imports torch

        lines += ["", *balance_lines(recipe, drawn.sizes, worlds)]
    return lines


def plan_and_draw(recipe: Recipe, num_steps: int) -> tuple[Plan, DrawCounts]:
    """A recipe's plan, and the sums over its first steps, at most `num_steps`.

    Raises:
        DatasetError, FormatError, MixtureError, PlanError: see `shards.stream.plan.open_plan`.
    """
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings)
    return plan, draw_steps(plan, min(num_steps, recipe.train.steps))
