"""Shares of the datasets in a recipe's mixture and in the draws of its first steps, from indexes, without torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from molmo2.config import Recipe
from shards.stream.mixture import SCALE
from shards.stream.plan import Cursor, Plan, open_plan


@dataclass(slots=True)
class DrawCounts:
    """Sums over the first steps; entry i of a list is for dataset i of the plan."""

    steps: int
    packs: int = 0
    samples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    fewest_tokens: int = sys.maxsize  # tokens of the pack with the fewest


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One dataset of a mixture.

    Attributes:
        size: samples in the dataset.
        asked, drawn, tokens: fractions: the recipe's share of draws, the share in the first steps, and the share of
            their tokens.
        tokens_each, crops_each: mean numbers of tokens and crops per draw.
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
    epochs: float


def draw_steps(plan: Plan, num_steps: int) -> DrawCounts:
    """Plan the first steps and count their packs, samples, tokens and crops."""
    zeros = [0] * len(plan.datasets)
    drawn = DrawCounts(num_steps, samples=zeros.copy(), tokens=zeros.copy(), crops=zeros.copy())
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


def shares_of(recipe: Recipe, plan: Plan, drawn: DrawCounts) -> list[Share]:
    """The datasets of a mixture in the recipe's order."""
    numbers = {dataset.name: number for number, dataset in enumerate(plan.datasets)}
    total, tokens = sum(drawn.samples), sum(drawn.tokens)
    shares = []
    for group, spec in recipe.data.drawn_mixture.groups.items():
        for name in spec.datasets:
            i = numbers[name]
            asked, count, size = plan.weights[name] / SCALE, drawn.samples[i], len(plan.datasets[i])
            share = Share(
                group=group,
                name=name,
                size=size,
                asked=asked,
                drawn=count / total,
                tokens=drawn.tokens[i] / tokens,
                tokens_each=drawn.tokens[i] / max(1, count),
                crops_each=drawn.crops[i] / max(1, count),
                epochs=asked * total / drawn.steps * recipe.train.steps / size,
            )
            shares.append(share)
    return shares


def plan_and_draw(recipe: Recipe, num_steps: int) -> tuple[Plan, DrawCounts]:
    """A recipe's plan, and the sums over its first steps, at most `num_steps`.

    Raises:
        DatasetError, FormatError, MixtureError, PlanError: see `shards.stream.plan.open_plan`.
    """
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings)
    return plan, draw_steps(plan, min(num_steps, recipe.train.steps))
