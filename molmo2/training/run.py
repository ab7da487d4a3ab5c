"""A checked recipe on its ranks, the lock of its folder, and the agreement of ranks on the samples to mask."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from molmo2.config import Recipe
from molmo2.model.presets import ModelConfig
from molmo2.parallel.mesh import Mesh
from molmo2.processing.tokenizer import Tokenizer
from shards.atomic import LockHeldError, file_lock
from shards.layout import VisualLayout
from shards.stream.collate import Batch
from shards.stream.loader import pack_reader
from shards.stream.plan import Cursor, Plan
from shards.stream.read_ahead import MicroSpec
from shards.stream.reader import Damage

# Names of the files in a run's folder, beside its checkpoints.
LOG_NAME = "log.jsonl"  # one line a step
DATA_NAME = "data.jsonl"  # one line a checkpoint: shares, epochs and masked samples of every dataset
CHANGES_NAME = "data_changes.jsonl"  # one line for each change of the data with --change-data
QUARANTINE_NAME = "quarantine.jsonl"  # one line for each damaged sample that was masked
ANOMALIES_NAME = "anomalies.jsonl"  # one line for each loss spike or loss that is not finite
EVAL_NAME = "eval.jsonl"  # one line for each evaluation on held-out data, the first before step 1
SAMPLES_NAME = "samples"  # folder of generated answers
SUMMARY_NAME = "summary.json"  # written at the end
REPORT_NAME = "report.html"
STOP_NAME = "stop"  # a user creates it to stop the run
LOCK_NAME = "lock"  # locked by the process that trains the run; holds its process number and machine
LOGS = (LOG_NAME, DATA_NAME, CHANGES_NAME, QUARANTINE_NAME, ANOMALIES_NAME)  # each line is of a training step

# The fields of a batch in which ranks of a group may differ: each has the crops of its own split, and read by itself.
# Samples that they masked differently differ in the other fields too.
OWN_FIELDS = frozenset({"pixels", "masked", "reads"})


class TrainingError(ValueError):
    """The run cannot go on: a loss spike or a loss that is not finite, or ranks of a group that read different data."""


Scorer = Callable[[Any], dict[str, float]]  # a model -> scores by name; collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A checked recipe on its ranks: everything that training needs and that does not change during the run.

    `held_out`: the plan of the validation batches, if the recipe has an `eval` section; `score` scores its benchmarks.
    """

    recipe: Recipe
    mesh: Mesh
    device: torch.device
    model_config: ModelConfig
    plan: Plan
    layout: VisualLayout
    tokenizer: Tokenizer
    held_out: Plan | None = None
    score: Scorer | None = None


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made: one process trains a run. The kernel frees it when that one ends.

    Raises:
        TrainingError: another live process holds the lock.
        OSError: the file system has no locks.
    """
    path = run_dir / LOCK_NAME
    with ExitStack() as stack:
        try:
            file = stack.enter_context(file_lock(path))
        except LockHeldError:
            raise TrainingError(
                f"{run_dir}: {path.read_text().strip() or 'another process'} trains this run; wait for its end, stop "
                f"it (touch {run_dir / STOP_NAME}), or give this run another name"
            ) from None
        os.register_at_fork(after_in_child=file.close)  # a loader worker that outlives this process holds no lock
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield


def field_digests(batch: Batch) -> dict[str, int]:
    """A 64-bit digest (signed) of every field that the ranks of a group share; the batch is in host memory.

    It depends on the order of the values, on shapes and dtypes.
    """
    digests = {}
    for field in fields(batch):
        if field.name in OWN_FIELDS:
            continue
        value, state = getattr(batch, field.name), xxhash.xxh3_64()
        if isinstance(value, torch.Tensor):
            state.update(f"{value.dtype} {tuple(value.shape)}".encode())
            state.update(np.ascontiguousarray(value.numpy()).data)
        else:
            state.update(repr(value).encode())
        digests[field.name] = int.from_bytes(state.digest(), signed=True)
    return digests


def differing_fields(batch: Batch, run: Run) -> list[str]:
    """Names of the fields that the ranks that share this pack have read differently; one all-gather in the group.

    Args:
        batch: the batch in host memory.
        run: the run.
    """
    if run.mesh.sp_group is None:
        return []
    digests = field_digests(batch)
    own = torch.tensor(list(digests.values()), device=run.device)
    peers = [torch.empty_like(own) for _ in range(run.mesh.sp)]
    dist.all_gather(peers, own, group=run.mesh.sp_group)
    columns = torch.stack(peers, dim=1).tolist()
    return [name for name, column in zip(digests, columns, strict=True) if len(set(column)) > 1]


def agree_on_masked(run: Run, batch: Batch, cursor: Cursor) -> Batch:
    """The batch with every sample masked that any rank of its group found damaged, in host memory; collective.

    Args:
        run: the run.
        batch: the batch as this rank read it, in host memory.
        cursor: the place in the data at which the batch's step begins.

    Raises:
        TrainingError: the ranks still have different packs after masking.
    """
    if not differing_fields(batch, run):
        return batch
    gathered: list[tuple[Damage, ...]] = [()] * run.mesh.sp
    dist.all_gather_object(gathered, batch.masked, group=run.mesh.sp_group)
    step = run.plan.step(cursor)
    packs = tuple(step.packs[slot] for slot in batch.slots)
    known = {(damage.dataset, damage.shard, damage.row): damage for damages in gathered for damage in damages}
    spec = MicroSpec(packs, step.divisor, step.cursor)
    reader = pack_reader(run.plan, run.layout, (run.mesh.sp_rank, run.mesh.sp))
    batch = reader.without(spec, known.values())
    if differing := differing_fields(batch, run):
        raise TrainingError(
            f"step {batch.step + 1}: rank {run.mesh.rank} and its sp peers read different packs (slots {batch.slots}, "
            f"fields {', '.join(differing)}); check the shards with tools/verify_shards.py on every machine"
        )
    return batch
