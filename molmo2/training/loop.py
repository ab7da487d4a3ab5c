"""The training loop: gradient accumulation, update, metrics, validation and checkpoints of every step of a run."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.checkpoint import files as checkpoints
from molmo2.checkpoint.files import CheckpointError
from molmo2.model.loss import LossSums
from molmo2.parallel.agree import on_rank_zero, say, sum_over_ranks, write_line
from molmo2.parallel.mesh import Mesh
from molmo2.training.anomalies import LossHistory, action_for, describe
from molmo2.training.cost import batch_flops, measured_balance, pack_cost, speed
from molmo2.training.metrics import Monitor, StepClock, gpu_use
from molmo2.training.optim import ComponentAdamW, set_learning_rates
from molmo2.training.run import (
    ANOMALIES_NAME,
    DATA_NAME,
    QUARANTINE_NAME,
    REPORT_NAME,
    STOP_NAME,
    Run,
    TrainingError,
    agree_on_masked,
)
from molmo2.training.watchdog import Watchdog
from shards.atomic import append_to
from shards.stream.collate import PAD_SEGMENT, Batch
from shards.stream.loader import Quarantine, make_loader, micro_steps
from shards.stream.plan import Cursor
from shards.stream.reader import Damage

if TYPE_CHECKING:
    from molmo2.checkpoint.mirror import Sender  # loaded by runs that have a mirror

SIGNAL_WAIT = 120.0  # seconds that a run waits for its mirror after a signal, at most: its time is short
MIRROR_TURN = 0.2  # seconds between looks at an upload that the end of a run waits for


class StopSignal:
    """Records that SIGTERM or SIGUSR1 arrived on this rank; the run finishes the current step and then stops."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.seen = True


def sees_stop_file(run: Run) -> bool:
    """Whether this is rank 0 and there is a `stop` file in the run's folder.

    Only rank 0 looks, since a shared file system may show a new file to some machines a step later than to others.
    """
    return run.mesh.rank == 0 and (run.recipe.run_dir / STOP_NAME).exists()


Ending = Literal["finished", "signal", "stop file"]  # why a run ended


@dataclass(slots=True)
class Progress:
    """The state of a run beside weights and optimizer.

    Steps done, the place in the data, the last losses, and the damaged samples that all ranks have found.
    """

    step: int
    cursor: Cursor
    history: LossHistory
    quarantine: Quarantine


class StepSums(NamedTuple):
    """One rank's contribution to a step, float64: scalars, and vectors over the datasets.

    `loss` and `z_loss` are divided by the loss weight of the step.
    """

    loss: Tensor
    z_loss: Tensor
    signalled: Tensor  # 1 if the rank got a signal to stop
    stop_file: Tensor  # 1 if the rank has seen the `stop` file
    masked: Tensor  # number of quarantined samples
    crops: Tensor
    retries: Tensor  # reads from storage that were repeated after an error
    cache_hits: Tensor  # reads from shards in the disk cache
    megabytes: Tensor  # bytes read as stored, in units of 1e6
    flops: Tensor  # the model's operations, forward and backward
    tokens: Tensor
    dataset_loss: Tensor  # [datasets], weighted cross entropy
    dataset_weight: Tensor  # [datasets], loss weight
    dataset_tokens: Tensor  # [datasets]
    forward_seconds: Tensor  # [dp * micro-steps], of this rank's forward passes at its own places


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """The sums of one step over all ranks, with the names of `StepSums`."""

    loss: float
    z_loss: float
    signalled: float
    stop_file: float
    masked: float
    crops: float
    retries: float
    cache_hits: float
    megabytes: float
    flops: float
    tokens: float
    losses: dict[str, float]  # mean cross entropy of each dataset in the step
    group_losses: dict[str, float]  # mean cross entropy of each group of the mixture in the step
    tokens_of: dict[str, float]  # number of tokens of each dataset in the step
    balance: dict[str, float]  # how the ranks shared the work, see `measured_balance`


def record_masked(batch: Batch, run: Run) -> None:
    """Write damaged samples to `quarantine.jsonl` and report them on stderr; one rank of a group does it."""
    if not batch.masked or run.mesh.sp_rank:
        return
    with append_to(run.recipe.run_dir / QUARANTINE_NAME) as file:
        for damage in batch.masked:
            file.write(json.dumps({"step": batch.step + 1, **asdict(damage)}) + "\n")
            write_line(f"masked in step {batch.step + 1}: {damage}", sys.stderr)


def compute(
    run: Run,
    engine: Any,
    batches: Iterator[Batch],
    clock: StepClock,
    watchdog: Watchdog,
    progress: Progress,
    stop: StopSignal,
) -> tuple[StepTotals, Cursor]:
    """Accumulate the gradients of one step in the engine: forward and backward over all its micro-batches.

    Returns:
        The step's sums, and the place in the data after it.

    Raises:
        QuarantineError: all ranks together have found more damaged samples than a dataset may have; on every rank.
    """
    train, cursor, names = run.recipe.train, progress.cursor, [dataset.name for dataset in run.plan.datasets]
    step = cursor.step + 1
    frozen, group_of = run.recipe.frozen, run.recipe.data.mixture.group_of
    sums: StepSums | None = None
    damages: list[Damage] = []
    for _ in range(micro_steps(train.packs_per_step, run.mesh.dp, train.micro_batch)):
        watchdog.enter("data", step)
        since = time.perf_counter()
        batch = next(batches)
        clock.waiting(since)
        clock.reads(batch.reads)
        watchdog.enter("forward", step, batch.slots)
        batch = agree_on_masked(run, batch, cursor)
        record_masked(batch, run)
        damages += batch.masked
        placed = engine.module.place(batch, run.device)
        with clock.forward():
            loss, logged = engine(placed, len(names))
        watchdog.enter("backward", step, batch.slots)
        engine.backward(loss, scale_wrt_gas=False)
        own = local_sums(placed.batch, logged, run.mesh.sp, batch_flops(batch, run.model_config, frozen))
        sums = own if sums is None else StepSums(*map(torch.add, sums, own))
    assert sums is not None, "a step has a micro-step at least"
    sums = sums._replace(
        signalled=torch.full_like(sums.loss, stop.seen),
        stop_file=torch.full_like(sums.loss, sees_stop_file(run)),
        forward_seconds=own_row(clock.forward_seconds(), run.mesh).to(sums.loss.device),
    )
    totals = totals_of(sum_over_ranks(sums), names, group_of, run.mesh.dp)
    if totals.masked:
        gathered: list[list[Damage]] = [[] for _ in range(run.mesh.world)]
        dist.all_gather_object(gathered, damages)
        progress.quarantine.add(chain.from_iterable(gathered))
    return totals, batch.cursor


def own_row(seconds: Sequence[float], mesh: Mesh) -> Tensor:
    """This rank's seconds in the row of its group, the other rows 0, float64 [dp * n]: the sum has all ranks' times."""
    table = torch.zeros(mesh.dp, len(seconds), dtype=torch.float64)
    table[mesh.dp_rank] = torch.tensor(seconds, dtype=torch.float64) / mesh.sp  # the mean of the group's ranks
    return table.flatten()


def local_sums(batch: Batch, logged: LossSums, sp: int, flops: int) -> StepSums:
    """One rank's contribution to a step for one micro-batch of `flops` operations, on the device of `logged`.

    Values that the ranks of a group share are divided by the size of the group. No value is copied to the host.
    """
    inside, counts = batch.segment_ids != PAD_SEGMENT, batch.reads.counts
    tokens = torch.zeros_like(logged.dataset_loss, dtype=torch.float64)
    tokens.scatter_add_(0, batch.dataset_ids.flatten(), inside.flatten().double() / sp)
    host = (
        len(batch.masked) / sp,
        len(batch.pixels),
        counts.get("retries", 0),
        counts.get("cache_hits", 0),
        counts.get("bytes", 0) / 1e6,
        flops / sp,
    )
    masked, crops, retries, cache_hits, megabytes, operations = (
        torch.tensor(host, dtype=torch.float64).to(tokens.device, non_blocking=True).unbind()
    )
    return StepSums(
        loss=logged.cross_entropy.double(),
        z_loss=logged.z.double(),
        signalled=torch.zeros_like(masked),  # known once a step, see `compute`
        stop_file=torch.zeros_like(masked),
        masked=masked,
        crops=crops,
        retries=retries,
        cache_hits=cache_hits,
        megabytes=megabytes,
        flops=operations,
        tokens=tokens.sum(),
        dataset_loss=logged.dataset_loss.double(),
        dataset_weight=logged.dataset_weight.double(),
        dataset_tokens=tokens,
        forward_seconds=torch.zeros_like(tokens[:0]),  # known once a step too
    )


def totals_of(sums: StepSums, names: Sequence[str], group_of: Mapping[str, str], dp: int) -> StepTotals:
    """The numbers of a step from its sums over all ranks; `names` are those of the datasets, which are in groups."""
    vectors = (sums.dataset_loss.tolist(), sums.dataset_weight.tolist(), sums.dataset_tokens.tolist())
    rows = list(zip(names, *vectors, strict=True))
    groups: dict[str, list[float]] = {}  # loss and weight
    for name, loss, weight, _ in rows:
        total = groups.setdefault(group_of[name], [0.0, 0.0])
        total[0] += loss
        total[1] += weight
    return StepTotals(
        **{name: value.item() for name, value in sums._asdict().items() if value.ndim == 0},
        losses={name: loss / weight for name, loss, weight, _ in rows if weight},
        group_losses={group: loss / weight for group, (loss, weight) in groups.items() if weight},
        tokens_of={name: tokens for name, _, _, tokens in rows if tokens},
        balance=measured_balance(sums.forward_seconds.view(dp, -1)),
    )


def update(run: Run, engine: Any, optimizer: ComponentAdamW, progress: Progress, totals: StepTotals) -> bool:
    """Apply the gradients, unless the step is anomalous and the recipe skips it; False when it was skipped.

    Raises:
        TrainingError: the loss or a gradient is not finite, or there is a loss spike, and the recipe says to stop;
            nothing was updated.
    """
    settings, history = run.recipe.anomalies, progress.history
    kind = history.judge(totals.loss, settings)
    action = action_for(kind, history, settings)
    if action != "stop":
        optimizer.begin(skip=action == "skip")
        engine.step()
        if kind is None and (optimizer.refused or not engine.was_step_applied()):
            kind = "nonfinite"  # the loss was finite and a gradient was not
            action = action_for(kind, history, settings)
    if kind is not None and run.mesh.rank == 0:
        line = describe(run.plan.step(progress.cursor), run.plan.datasets, kind, totals.loss, action)
        with append_to(run.recipe.run_dir / ANOMALIES_NAME) as file:
            file.write(json.dumps(line) + "\n")
        write_line(f"step {line['step']}: {kind}, loss {totals.loss:.4g}: {action}; packs: {file.name}", sys.stderr)
    if action == "stop":
        raise TrainingError(
            f"step {progress.step + 1}: loss {totals.loss:.4g} ({kind}: the loss or a gradient); nothing was updated; "
            "look at the losses of its samples with --replay, and start again from the last checkpoint with lower "
            f"learning rates (optim.*.lr), a longer warm-up, or anomalies.{kind}=skip"
        )
    history.add(totals.loss, action == "skip")
    return action != "skip"


def measurements(
    run: Run, step: int, totals: StepTotals, rates: dict[str, float], optimizer: ComponentAdamW, clock: StepClock
) -> dict[str, float]:
    """The values of one line of `log.jsonl`; it ends the clock's lap."""
    train = run.recipe.train
    seconds, data_wait, reads = clock.lap()
    return {
        "step": step,
        "loss": totals.loss,
        "z_loss": totals.z_loss,
        **{f"lr.{name}": rate for name, rate in rates.items()},
        **{f"grad_norm.{name}": norm.item() for name, norm in optimizer.norms.items()},
        "tokens": round(totals.tokens),
        "fill": totals.tokens / (train.packs_per_step * run.recipe.data.sequence_length),
        "tokens_per_second": totals.tokens / seconds,
        **speed(totals.flops, seconds, run.mesh.world, run.recipe.logging.peak_tflops),
        "data_wait": data_wait,
        **totals.balance,
        "seconds": seconds,
        "crops": round(totals.crops),
        "masked": round(totals.masked),
        "retries": round(totals.retries),
        "cache_hits": round(totals.cache_hits),
        "megabytes": totals.megabytes,
        **reads,
        **gpu_use(),
        **{f"loss.{name}": mean for name, mean in totals.losses.items()},
        **{f"group_loss.{name}": mean for name, mean in totals.group_losses.items()},
        **{f"tokens.{name}": round(count) for name, count in totals.tokens_of.items()},
    }


def save_checkpoint(run: Run, engine: Any, progress: Progress, sender: Sender | None, monitor: Monitor | None) -> None:
    """Write a checkpoint and begin to copy it to the mirror; when writing fails, `train.on_full_disk` decides."""
    recipe, state = run.recipe, run.plan.state(progress.cursor)
    history = {
        "losses": list(progress.history.losses),
        "damages": [asdict(damage) for damage in progress.quarantine.damages.values()],
    }
    in_use = sender.in_use if sender is not None else ()
    try:
        path = checkpoints.save(
            engine, recipe, run.model_config, progress.step, state, sp=run.mesh.sp, history=history, in_use=in_use
        )
    except CheckpointError as error:  # raised by all ranks together
        if recipe.train.on_full_disk == "stop":
            raise
        say(f"{recipe.name}: WARNING: training continues without a checkpoint: {error}")
    else:
        if sender is not None:
            sender.start(path)
    if monitor is not None:
        from molmo2.training.report import record_data, write_report

        try:
            monitor.plot(progress.step, record_data(run, progress.step, progress.cursor))
            write_report(recipe)
        except OSError as error:  # a missing report is no reason to stop a run
            write_line(f"{recipe.name}: WARNING: no {DATA_NAME} or {REPORT_NAME}: {error}", sys.stderr)


def ending_of(step: int, steps: int, totals: StepTotals) -> Ending | None:
    """Why the run ends after this step of `steps`; None if it goes on."""
    if step == steps:
        return "finished"
    if totals.signalled:
        return "signal"
    return "stop file" if totals.stop_file else None


def wait_for_mirror(sender: Sender | None, watchdog: Watchdog, step: int, seconds: float) -> None:
    """Wait until the copies of rank 0 are done, or give them up after a time; collective.

    All ranks wait together, in short turns: a single collective that waits for an upload could run into a timeout.
    """
    end, waiting = time.monotonic() + seconds, True
    while waiting:
        watchdog.enter("mirror", step)
        waiting = on_rank_zero(lambda: sender is not None and sender.advance() and time.monotonic() < end)
        time.sleep(MIRROR_TURN if waiting else 0)
    if sender is not None:
        sender.give_up()


def run_steps(
    run: Run, engine: Any, optimizer: ComponentAdamW, names: list[str], progress: Progress, stop: StopSignal
) -> Ending:
    """Train until the last step or a request to stop, and save checkpoints; `progress` is updated after every step."""
    recipe, steps = run.recipe, run.recipe.train.steps
    monitor = Monitor(recipe, progress.step) if run.mesh.rank == 0 else None
    sender = None
    if run.mesh.rank == 0 and recipe.train.mirror is not None:
        from molmo2.checkpoint.mirror import Sender

        sender = Sender(recipe, say)
    batches = make_loader(
        run.plan,
        progress.cursor,
        run.layout,
        dp_rank=run.mesh.dp_rank,
        dp_size=run.mesh.dp,
        sp_rank=run.mesh.sp_rank,
        sp_size=run.mesh.sp,
        micro_batch=recipe.train.micro_batch,
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        read_ahead=recipe.data.read_ahead_mib << 20,
        cache=recipe.data.cache_mib << 20,
        cost=pack_cost(recipe, run.model_config),
        damage_budget=None,  # the damaged samples of all ranks count together, see `compute`
    )
    clock, watchdog = StepClock(), Watchdog(run.mesh.rank, recipe.train.phase_deadline)

    def evaluate(step: int) -> None:
        from molmo2.training.validation import judge

        watchdog.enter("evaluation", step)
        judge(run, engine, step, monitor)
        clock.lap()  # validation counts towards no step's time

    try:
        if recipe.eval is not None and progress.step == 0:
            evaluate(0)  # the weights from which a new run starts
        for step in range(progress.step + 1, steps + 1):
            rates = set_learning_rates(optimizer, names, recipe.optim, step, steps)
            totals, cursor = compute(run, engine, batches, clock, watchdog, progress, stop)
            watchdog.enter("update", step)
            updated = update(run, engine, optimizer, progress, totals)
            progress.step, progress.cursor = step, cursor
            if monitor is not None:
                line = measurements(run, step, totals, rates, optimizer, clock)
                monitor.step(line if updated else line | {"skipped": 1})
            ending = ending_of(step, steps, totals)
            due = recipe.eval is not None and (step == steps or step % recipe.eval.every == 0)
            if due and ending != "signal":  # a launcher kills the ranks a while after its signal
                evaluate(step)
            if sender is not None:
                sender.advance()
            if ending or step % recipe.train.checkpoint_every == 0:
                watchdog.enter("checkpoint", step)
                save_checkpoint(run, engine, progress, sender, monitor)
            if ending:
                on_rank_zero((recipe.run_dir / STOP_NAME).unlink, missing_ok=True)
                limit = recipe.train.mirror_deadline
                wait_for_mirror(sender, watchdog, step, min(limit, SIGNAL_WAIT) if ending == "signal" else limit)
                break
        return ending or "finished"
    finally:
        watchdog.stop()
        if monitor is not None:
            monitor.close()
