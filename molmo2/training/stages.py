"""The stages of `molmo2/train.py`: from a recipe to the end of its run, on every rank.

A stage checks that recipe, data and ranks fit together, finds the newest checkpoint, builds model and engine, restores
them, runs the steps (`molmo2.training.loop`) and writes the summary. The command line is in `molmo2.train`.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from molmo2.checkpoint import files as checkpoints
from molmo2.checkpoint.files import Checkpoint, CheckpointError
from molmo2.config import Recipe
from molmo2.model.presets import PRESETS
from molmo2.parallel.agree import AgreedError, all_ranks_ok, lost_peer, on_rank_zero, say, write_line
from molmo2.parallel.mesh import Mesh, MeshError, check_mesh, gather_machines, make_mesh
from molmo2.training.anomalies import LossHistory
from molmo2.training.engine import read_engine_keys, start_distributed, start_engine
from molmo2.training.loop import Ending, Progress, StopSignal, run_steps
from molmo2.training.metrics import cut_log
from molmo2.training.prepare import prepare
from molmo2.training.run import EVAL_NAME, LOGS, SUMMARY_NAME, Run, Scorer, TrainingError, lock_run
from molmo2.training.start import starting_model
from shards.stream.loader import Quarantine, QuarantineError
from shards.stream.plan import Cursor, PlanError
from shards.stream.reader import Damage

OpenScorer = Callable[[Run], Scorer | None]
STOPPED = os.EX_TEMPFAIL  # 75: a signal stopped the run before its end; whoever sent it should start the run again


def form_mesh(recipe: Recipe, machines: Sequence[str]) -> Mesh:
    """Check that ranks, packs, heads and machines fit together, and create the groups of ranks; collective."""
    if recipe.model not in PRESETS:
        raise ValueError(f"model {recipe.model!r} is not a preset; known: {', '.join(sorted(PRESETS))}")
    train = recipe.train
    check_mesh(
        world=dist.get_world_size(),
        sp=train.sp,
        packs_per_step=train.packs_per_step,
        micro_batch=train.micro_batch,
        num_heads=PRESETS[recipe.model].text.num_heads,
        machines=machines,
        sp_across_machines=train.sp_across_machines,
    )
    return make_mesh(train.sp)


def newest_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The newest whole checkpoint of a run, on the disk or in its mirror."""
    if recipe.train.mirror is None:
        return checkpoints.find_newest(checkpoints.checkpoints_dir(recipe.run_dir), say)
    from molmo2.checkpoint import mirror

    return mirror.newest(recipe, say)


def resume(
    run: Run, engine: Any, checkpoint: Checkpoint | None, universal: Path | None, change_data: bool = False
) -> Progress:
    """Restore model, optimizer, the place in the data and the last losses from a checkpoint.

    Args:
        run: the run.
        engine: a new engine.
        checkpoint: the checkpoint to resume from; None starts from the beginning.
        universal: the converted states of the checkpoint, if the number of ranks or the ZeRO stage has changed.
        change_data: accept changed data and record the change; otherwise the plan refuses data that have changed.
    """
    datasets, budget = run.plan.datasets, run.recipe.data.damage_budget
    if checkpoint is None:
        return Progress(0, Cursor(), LossHistory(), Quarantine(datasets, budget))
    state = checkpoint.read(checkpoints.PLAN)
    if change_data:
        from molmo2.checkpoint.changes import take_over

        cursor = take_over(run, state)
    else:
        cursor = run.plan.restore(state)
    if universal and run.recipe.train.zero_stage == 0:
        from molmo2.checkpoint.reshard import load_whole

        load_whole(engine, universal)
    else:
        checkpoints.load_states(engine, universal or checkpoint.path)
    from molmo2.checkpoint.changes import recipe_changes

    if changed := recipe_changes(checkpoint, run.recipe):
        say(f"{run.recipe.name}: the recipe has changed since step {checkpoint.step}: {', '.join(changed)}")
    quarantine = Quarantine(datasets, budget, (Damage(**damage) for damage in checkpoint.meta.get("damages", ())))
    return Progress(checkpoint.step, cursor, LossHistory(checkpoint.meta.get("losses", ())), quarantine)


def train_stage(
    recipe: Recipe,
    device: torch.device,
    stop: StopSignal,
    arguments: argparse.Namespace,
    given: bool,
    scorer: OpenScorer,
) -> Ending:
    """Train one stage, and return why it ended. `given`: its `init` is that of `--checkpoint`."""
    machines = gather_machines()
    with all_ranks_ok():
        mesh = form_mesh(recipe, machines)
        added = read_engine_keys(arguments.deepspeed_config)
        run = prepare(recipe, mesh, device)
        run = replace(run, score=scorer(run))
    checkpoint = on_rank_zero(newest_checkpoint, recipe)
    with all_ranks_ok():
        if checkpoint and given:
            from molmo2.checkpoint.changes import check_first_weights

            check_first_weights(checkpoint, recipe)
    done = 0 if checkpoint is None else checkpoint.step
    if done >= recipe.train.steps:
        say(f"{recipe.name}: finished at step {done}; nothing to do")
        if not (recipe.run_dir / SUMMARY_NAME).exists():
            from molmo2.training.summary import finish

            on_rank_zero(finish, recipe)
        return "finished"
    on_rank_zero(cut_run_after, recipe, done)
    train = recipe.train
    say(
        f"{recipe.name}: steps {done + 1}-{train.steps}, {train.packs_per_step} packs of {recipe.data.sequence_length} "
        f"tokens each, on {mesh.world} ranks (dp {mesh.dp}, sp {mesh.sp}), {train.precision}, ZeRO-{train.zero_stage}"
    )
    if checkpoint is None:
        from molmo2.training.recipe_warnings import recipe_warnings

        for line in recipe_warnings(recipe, run.plan, device.type):
            say(line)
    universal, differing = None, list[str]()
    with all_ranks_ok():
        if checkpoint:
            from molmo2.checkpoint.changes import check_trained_parameters, mesh_changes

            differing = mesh_changes(checkpoint, recipe)
            check_trained_parameters(checkpoint, recipe)
    if checkpoint and differing:
        from molmo2.checkpoint.reshard import convert_checkpoint

        universal = on_rank_zero(convert_checkpoint, checkpoint)
        say(f"{recipe.name}: {', '.join(differing)}: the checkpoint was converted; the order of the data is the same")
    check_sp = arguments.check_sp and mesh.sp > 1
    # The engine loads all weights of a checkpoint, except frozen ones of a converted checkpoint.
    read = checkpoint is None or universal is not None or check_sp
    model = starting_model(run, checkpoint, whole=check_sp, read=read)
    if check_sp:
        from molmo2.training.check_sp import check_sequence_parallel

        errors = check_sequence_parallel(model, recipe, mesh, device)
        say(f"{recipe.name}: sp {mesh.sp} agrees with one rank to {max(errors.values()):.1e}")
    engine, optimizer, names = start_engine(model, recipe, mesh, universal is not None, added)
    with all_ranks_ok():
        progress = resume(run, engine, checkpoint, universal, arguments.change_data)
    if universal:
        on_rank_zero(shutil.rmtree, universal)
    ending = run_steps(run, engine, optimizer, names, progress, stop)
    engine.destroy()
    if ending == "finished":
        from molmo2.training.summary import finish

        on_rank_zero(finish, recipe)
    else:
        say(
            f"{recipe.name}: stopped on request ({ending}) after step {progress.step} of {recipe.train.steps}; "
            "start again to continue"
        )
    return ending


def cut_run_after(recipe: Recipe, step: int) -> None:
    """Remove checkpoints and log lines of steps after the one from which the run resumes."""
    checkpoints.clear_after(checkpoints.checkpoints_dir(recipe.run_dir), step)
    for name in LOGS:
        cut_log(recipe.run_dir / name, step)
    cut_log(recipe.run_dir / EVAL_NAME, step or -1)  # a run from the beginning evaluates its first weights again


def run_stages(recipes: Callable[[], list[Recipe]], arguments: argparse.Namespace, scorer: OpenScorer) -> int:
    """Train the stages, and return the exit code; an error that a user can mend is printed in one message, with code 1.

    Args:
        recipes: loads the recipes of the stages, in order.
        arguments: the command line of `molmo2/train.py`.
        scorer: makes what scores the benchmarks of a recipe, or None if it has none.
    """
    try:
        device = start_distributed()
    except MeshError as error:
        write_line(f"train.py: {error}", sys.stderr)
        return 1
    stop = StopSignal()
    ending: Ending = "finished"
    try:
        with all_ranks_ok():
            stages = recipes()
        for number, recipe in enumerate(stages):
            given = number == 0 and arguments.checkpoint is not None
            with ExitStack() as lock:
                on_rank_zero(lock.enter_context, lock_run(recipe.run_dir))
                ending = train_stage(recipe, device, stop, arguments, given, scorer)
            if ending != "finished":
                break
            gc.collect()
    except AgreedError:
        return 1
    except (TrainingError, CheckpointError, QuarantineError, PlanError, MeshError, OSError) as error:
        write_line(f"train.py: rank {dist.get_rank()}: {error}", sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        write_line(f"train.py: rank {dist.get_rank()}: stopped, because another rank has ended", sys.stderr)
        return 1
    dist.barrier()  # a launcher kills the other ranks when the first has exited with another code than 0
    dist.destroy_process_group()
    return STOPPED if ending == "signal" else 0
