"""Train one stage, or all stages of a folder, from recipes.

    deepspeed molmo2/train.py --recipe recipes/demo/stage1.yaml
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 molmo2/train.py --recipe recipes/demo/stage1.yaml --all-stages
    torchrun --nproc_per_node 8 molmo2/train.py --recipe recipes/demo/stage2.yaml --set train.steps=100
    python molmo2/train.py --recipe recipes/demo/stage1.yaml

The last line trains on one rank. A run resumes from its newest whole checkpoint by itself. SIGTERM or SIGUSR1 makes it
save a checkpoint and exit with 75: start it again. A file `runs/<name>/stop` makes it save and exit with 0. It writes
to `runs/<name>/`: log.jsonl, data.jsonl, quarantine.jsonl, summary.json, checkpoints and TensorBoard.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molmo2.config import FirstWeights, Recipe
    from molmo2.training.run import Run, Scorer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--checkpoint", metavar="PATH", help="weights to start from, in place of the recipe's init")
    parser.add_argument("--all-stages", action="store_true", help="run every stage*.yaml beside the recipe, in order")
    parser.add_argument("--dry-run", action="store_true", help="print recipe, plan, memory and time on 1 to 128 GPUs")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="--dry-run: memory of a GPU (the one found)")
    parser.add_argument("--gpu-price", type=float, metavar="USD", help="--dry-run: price of a GPU for an hour")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="--dry-run: a run's folder, whose MFU to assume")
    parser.add_argument("--inspect", type=int, nargs="?", const=1, metavar="STEP", help="check data, print a step")
    parser.add_argument("--replay", type=int, metavar="STEP", help="loss of each sample of a step, before its update")
    parser.add_argument("--change-data", action="store_true", help="resume with other data or another mixture")
    parser.add_argument("--check-sp", action="store_true", help="compare a pack on one rank and on a group first")
    parser.add_argument("--deepspeed_config", type=Path, metavar="JSON", help="buffers, prefetching, profiling")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and any((arguments.gpu_memory, arguments.gpu_price, arguments.measured)):
        parser.error("--gpu-memory, --gpu-price and --measured are of --dry-run")
    return arguments


def read_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Load the recipes to run, in order; the first starts from the weights of `--checkpoint`."""
    from molmo2.config import load_recipe

    paths = sorted(arguments.recipe.parent.glob("stage*.yaml")) if arguments.all_stages else []
    first, *others = paths or [arguments.recipe]
    init = None if arguments.checkpoint is None else named_weights(arguments.checkpoint)
    recipes = [load_recipe(first, arguments.set, init), *(load_recipe(path, arguments.set) for path in others)]
    if any(recipe.eval and recipe.eval.benchmarks for recipe in recipes):
        from molmo2.eval.benchmarks import check_recipes

        check_recipes(recipes)
    return recipes


def named_weights(name: str) -> str | FirstWeights:
    """The `init` of a recipe for a run or checkpoint of this project, or for a released or exported Molmo2."""
    from molmo2.config import FirstWeights
    from molmo2.weights.load import is_run

    return name if is_run(name) else FirstWeights(molmo2=name)


def open_scorer(run: Run) -> Scorer | None:
    """What scores the recipe's benchmarks at each validation; None without benchmarks."""
    if run.recipe.eval is None or not run.recipe.eval.benchmarks:
        return None
    from molmo2.eval.during_training import Scorer

    return Scorer(run)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for, and return the exit code."""
    from shards.command import quiet_libraries

    arguments = parse_arguments(argv)
    quiet_libraries()
    recipes = functools.partial(read_recipes, arguments)
    # Torch and DeepSpeed take seconds to load, so they wait until the command line has been read.
    if arguments.dry_run or arguments.inspect is not None or arguments.replay is not None:
        from molmo2.inspection.look import look

        return look(recipes, arguments)
    from molmo2.training.stages import run_stages

    return run_stages(recipes, arguments, open_scorer)


if __name__ == "__main__":
    if code := main():
        from molmo2.parallel.agree import leave

        leave(code)
