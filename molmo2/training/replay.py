"""Replay of one step of a run: its packs, their samples as text, and the loss of each under a checkpoint's weights.

The plan determines what every step of a run reads, so nothing has to be recorded for it. It runs in one process,
without a launcher.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from molmo2.checkpoint.files import META, PLAN, Checkpoint, checkpoints_dir, find_damage, step_folders
from molmo2.checkpoint.lookup import load_weights
from molmo2.model.molmo2 import Molmo2, inference_dtype
from molmo2.training.anomalies import sample_name
from molmo2.training.engine import TrainingModule
from molmo2.training.run import Run
from shards.format import INDEX_NAME, tar_members
from shards.storage.base import read_threads
from shards.stream.collate import MEMBER, PAD_SEGMENT, Batch
from shards.stream.dataset import Dataset, DatasetError
from shards.stream.loader import pack_reader
from shards.stream.plan import Cursor, Draw, PackSpec, Plan, StepSpec
from shards.stream.read_ahead import MicroSpec

TEXT_LENGTH = 300  # a message is cut after this many characters


def find_step(run: Run, number: int) -> StepSpec:
    """Step `number` (from 1) of the plan, computed from the nearest checkpoint before it, or from the start.

    Raises:
        ValueError: `number` is less than 1.
        PlanError: the checkpoint was trained on other data.
    """
    if number < 1:
        raise ValueError(f"step {number}: the first one is 1")
    checkpoint = _before(run, number)
    cursor = run.plan.restore(checkpoint.read(PLAN)) if checkpoint else Cursor()
    while cursor.step < number - 1:
        cursor = run.plan.step(cursor).cursor
    return run.plan.step(cursor)


def _before(run: Run, number: int) -> Checkpoint | None:
    """The newest whole checkpoint of the run that was written before step `number`."""
    for path in reversed(step_folders(checkpoints_dir(run.recipe.run_dir))):
        if int(path.name.removeprefix("step-")) < number and find_damage(path) is None:
            return Checkpoint(path, json.loads((path / META).read_text()))
    return None


def check_shard_files(run: Run) -> int:
    """Check that every shard file of the data and of the held-out data is there, and return how many there are.

    Raises:
        DatasetError: shard files are missing or have another size than in the index; each is named.
    """
    datasets = [*run.plan.datasets, *(() if run.held_out is None else run.held_out.datasets)]
    distinct = {dataset.storage.root: dataset for dataset in datasets}.values()
    if problems := shard_problems(distinct):
        listed = "\n  ".join(problems)
        raise DatasetError(f"{len(problems)} shard files are not whole; fetch or build them again:\n  {listed}")
    return sum(len(dataset.index.shards) for dataset in distinct)


def show_packs(run: Run, step: StepSpec, num_packs: int) -> Iterator[str]:
    """Lines to print: the packs of a step, each sample with its name, its lengths and its messages."""
    for pack in step.packs[:num_packs]:
        yield _heading(run, pack)
        for draw in pack.draws:
            yield f"  {_place(run.plan, draw)}"
            yield from _messages(run.plan, draw)
    if len(step.packs) > num_packs:
        yield f"and {len(step.packs) - num_packs} more packs in this step"


def show_losses(run: Run, step: StepSpec, fresh: Molmo2 | None = None) -> Iterator[str]:
    """Lines to print: the loss of every sample of a step, under the weights before it.

    `fresh`: the run's initial weights, for a step with no checkpoint before it.

    Raises:
        ValueError: no checkpoint of the run precedes the step, and `fresh` is None.
    """
    number = step.step + 1
    checkpoint = _before(run, number)
    if checkpoint is not None:
        config, weights, _ = load_weights(checkpoint.path)
        model, done = Molmo2.with_weights(config, weights), checkpoint.step
    elif fresh is not None:
        model, done = fresh, 0
    else:
        raise ValueError(f"step {number}: no whole checkpoint comes before it")
    yield f"step {number} under the weights of step {done}" + (
        "" if done == number - 1 else f": {number - 1 - done} updates before it are not in them"
    )
    dtype = inference_dtype(run.device, "fp32" if run.recipe.train.precision == "fp32" else None)
    module = TrainingModule(model, run.recipe, run.mesh).to(run.device, dtype).eval()
    reader = pack_reader(run.plan, run.layout)
    for pack in step.packs:
        batch = reader.read(MicroSpec((pack,), step.divisor, step.cursor))
        losses = member_losses(module, batch, len(pack.draws), run.device)
        yield _heading(run, pack)
        for draw, loss in zip(pack.draws, losses, strict=True):
            yield f"  {_place(run.plan, draw)}, loss {'none: masked' if loss is None else format(loss, '.4f')}"


@torch.no_grad()
def member_losses(
    module: TrainingModule, batch: Batch, num_members: int, device: torch.device | str
) -> list[float | None]:
    """Mean weighted cross entropy of every member of a batch of one pack, in host memory; None for one without loss."""
    inside = batch.segment_ids != PAD_SEGMENT
    members = torch.where(inside, batch.segment_ids // MEMBER, 0).long()
    batch = dataclasses.replace(batch, dataset_ids=members)  # in place of datasets
    _, logged = module(module.place(batch, device), num_members)
    pairs = zip(logged.dataset_loss.tolist(), logged.dataset_weight.tolist(), strict=True)
    return [total / weight if weight else None for total, weight in pairs]


def _heading(run: Run, pack: PackSpec) -> str:
    tokens, crops = sum(draw.num_tokens for draw in pack.draws), sum(draw.num_crops for draw in pack.draws)
    data = run.recipe.data
    return (
        f"step {pack.step + 1}, pack {pack.slot}: {len(pack.draws)} samples, "
        f"{tokens} of {data.sequence_length} tokens, {crops} of {data.max_crops} crops"
    )


def _place(plan: Plan, draw: Draw) -> str:
    return (
        f"{sample_name(plan.datasets, draw)} variant {draw.variant}: {draw.num_tokens} tokens, {draw.num_crops} crops, "
        f"weight {draw.loss_weight:.4g}"
    )


def _messages(plan: Plan, draw: Draw) -> Iterator[str]:
    tars = plan.datasets[draw.dataset].tars
    name = Path(f"{tars.shards[draw.shard]}.tar")
    members = tar_members(tars.storage.read(str(name), draw.offset, draw.span))
    record = json.loads(bytes(next(data for member, data in members.items() if member.endswith(".json"))))
    visuals = record["visuals"]
    kinds = [f"{visual['time']:.1f} s" if visual["kind"] == "frame" else "image" for visual in visuals]
    yield f"    {record['key']} sees {', '.join(kinds[:8]) or 'text alone'}{' ...' if len(kinds) > 8 else ''}"
    for message in record["variants"][draw.variant % len(record["variants"])]["messages"]:
        text = " ".join(message["content"].split())
        short = text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} ... ({len(text)} characters)"
        yield f"    [{message['branch']}] {message['role']}: {short}"


def shard_problems(datasets: Iterable[Dataset]) -> list[str]:
    """The tars that are missing or have another size than the index says, one line each; it reads none of them."""
    tars = [(dataset.storage, shard) for dataset in datasets for shard in dataset.index.shards]
    sizes = read_threads().map(lambda tar: tar[0].size(f"{tar[1].name}.tar"), tars)
    return [
        f"{storage.root}/{shard.name}.tar: "
        + ("missing" if size is None else f"{size:,} bytes, {shard.bytes:,} in {INDEX_NAME}")
        for (storage, shard), size in zip(tars, sizes, strict=True)
        if size != shard.bytes
    ]
