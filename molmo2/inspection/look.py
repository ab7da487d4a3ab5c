"""--dry-run, --inspect and --replay of the trainer: one process prints what a run is and does, and trains nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import yaml

from molmo2.config import Recipe
from molmo2.eval.during_training import missing_benchmarks, open_benchmarks
from molmo2.inspection.shares import draw_steps, mixture_lines, plan_and_draw
from molmo2.model.molmo2 import Molmo2
from molmo2.parallel.agree import write_line
from molmo2.parallel.mesh import SINGLE
from molmo2.training.dry_run import GPUS, Gpu, dry_run, this_gpu
from molmo2.training.prepare import prepare
from molmo2.training.recipe_warnings import recipe_warnings
from molmo2.training.replay import check_shard_files, find_step, show_losses, show_packs
from molmo2.training.run import Run
from molmo2.training.start import first_weights_of

PACKS_SHOWN = 3  # packs of a step that --inspect prints
STEPS_DRAWN = 50  # steps at the start whose draws --inspect and --dry-run count


def look(read_recipes: Callable[[], Sequence[Recipe]], arguments: argparse.Namespace) -> int:
    """Print what a flag asks about each recipe; return the exit code."""
    try:
        for recipe in read_recipes():
            if arguments.dry_run:
                gpu = this_gpu(recipe, arguments.gpu_memory, arguments.gpu_price, arguments.measured)
                lines = iter(dry_run_lines(recipe, gpu))
            elif arguments.inspect is not None:
                lines = inspect_lines(_run(recipe), arguments.inspect)
            else:
                lines = replay_lines(_run(recipe), arguments.replay)
            for line in lines:
                write_line(line)
    except (ValueError, OSError) as error:
        write_line(f"train.py: {error}", sys.stderr)
        return 1
    return 0


def _run(recipe: Recipe) -> Run:
    return prepare(recipe, SINGLE, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def dry_run_lines(recipe: Recipe, gpu: Gpu) -> list[str]:
    """What --dry-run prints: recipe, plan or why there is none yet, benchmarks to build, memory, time and cost."""
    needs = dry_run(recipe, gpu)  # first, since it checks the model's name
    plan = None
    try:
        plan, drawn = plan_and_draw(recipe, STEPS_DRAWN)
        mixture = mixture_lines(recipe, plan, drawn, worlds=GPUS)
    except (ValueError, OSError) as error:  # most often the shards are not built yet
        mixture = [f"plan: {error}"]
    missing = []
    if recipe.eval is not None and recipe.eval.benchmarks:
        missing = [*missing_benchmarks(recipe.eval), ""]
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return [*resolved.splitlines(), "", *mixture, "", *missing, *needs, "", *recipe_warnings(recipe, plan)]


def inspect_lines(run: Run, number: int) -> Iterator[str]:
    """What --inspect prints: files and benchmarks that are there, asked and drawn shares, packs of step `number`."""
    yield f"every one of the {check_shard_files(run):,} shard files is there\n"
    if run.recipe.eval is not None and run.recipe.eval.benchmarks:
        opened = open_benchmarks(run, run.recipe.eval)
        counts = [f"{one.benchmark.name} ({len(one.questions)} questions)" for one in opened]
        yield f"benchmarks at each validation: {', '.join(counts)}\n"
    drawn = draw_steps(run.plan, min(STEPS_DRAWN, run.recipe.train.steps))
    yield "\n".join(mixture_lines(run.recipe, run.plan, drawn)) + "\n"
    yield from show_packs(run, find_step(run, number), PACKS_SHOWN)


def replay_lines(run: Run, number: int) -> Iterator[str]:
    """What --replay prints: the loss of every sample of step `number`, before its update."""
    step = find_step(run, number)
    fresh = Molmo2.with_weights(run.model_config, dict(first_weights_of(run))) if number == 1 else None
    yield from show_losses(run, step, fresh)
