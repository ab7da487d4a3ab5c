"""Settings of a recipe that are allowed and most often a mistake, as lines to print before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from molmo2.config import COMPONENTS, FirstWeights, Recipe
from shards.stream.plan import Cursor, Plan, StepSpec

LONG_WARMUP = 1 / 3  # part of the steps
LOW_FILL = 0.6  # part of the tokens of the packs
STEPS_COUNTED = 50  # steps at the start whose packs are counted, at most


def recipe_warnings(recipe: Recipe, plan: Plan | None, device: str | None = None) -> list[str]:
    """One line for each doubtful setting: what it is, why, and what to set instead.

    Args:
        recipe: the run.
        plan: the order of its batches; None leaves out what the data show.
        device: "cuda" or "cpu", on which it is about to run; None: on another machine.
    """
    lines = [*_of_schedule(recipe), *_of_frozen_weights(recipe)]
    if device == "cpu" and recipe.train.precision == "bf16":
        lines.append("train.precision bf16 saves no time on a CPU and rounds every weight; set train.precision=fp32")
    if plan is not None:
        lines += _of_fill(recipe, plan)
    return [f"{recipe.name}: WARNING: {line}" for line in lines]


def _of_schedule(recipe: Recipe) -> Iterator[str]:
    steps = recipe.train.steps
    trained = [name for name in COMPONENTS if name not in recipe.train.freeze]
    warmups = {name: getattr(recipe.optim, name).warmup(steps) for name in trained}
    if long := [name for name, warmup in warmups.items() if warmup > LONG_WARMUP * steps]:
        yield (
            f"the warm-up of {', '.join(f'optim.{name}' for name in long)} takes {warmups[long[0]]:,} of {steps:,} "
            f"steps, so the learning rate is low for most of the run; set optim.{long[0]}.warmup_fraction=0.1"
        )


def _of_frozen_weights(recipe: Recipe) -> Iterator[str]:
    init = recipe.init
    if init is None and recipe.optim.freeze_base_embedding:
        yield (
            "init is null, so the embedding of the base vocabulary is random, and optim.freeze_base_embedding keeps it "
            "so; set optim.freeze_base_embedding=false, or name pretrained weights in init"
        )
    random = COMPONENTS if init is None else ("connector",) if isinstance(init, FirstWeights) and init.llm else ()
    for name in random:
        if name in recipe.frozen:
            key = "optim.lora" if name not in recipe.train.freeze else "train.freeze"
            yield f"{key} freezes the weights of the {name}, which are random at the start; train them, or change init"


def _of_fill(recipe: Recipe, plan: Plan) -> Iterator[str]:
    data = recipe.data
    sizes = [pack.sizes for step in islice(_steps(plan), min(STEPS_COUNTED, recipe.train.steps)) for pack in step.packs]
    tokens = sum(size.tokens for size in sizes) / (len(sizes) * data.sequence_length)
    crops = sum(size.crops for size in sizes) / (len(sizes) * max(1, data.max_crops))
    if tokens >= LOW_FILL:
        return
    if crops > tokens:
        reason, remedy = f"data.max_crops {data.max_crops} is reached first ({crops:.0%} full)", "raise data.max_crops"
    else:
        reason = f"few samples fit beside each other in {data.sequence_length:,} tokens (crops are {crops:.0%} full)"
        remedy = "change data.sequence_length, or raise data.window"
    yield f"packs hold {tokens:.0%} of the tokens that they could, and the rest is padding: {reason}; {remedy}"


def _steps(plan: Plan) -> Iterator[StepSpec]:
    """The steps of the first window."""
    cursor = Cursor()
    while cursor.window == 0:
        step = plan.step(cursor)
        yield step
        cursor = step.cursor
