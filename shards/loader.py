"""The loader: plan -> reader -> collate, in worker processes.

    sampler (main process)   steps of the plan, cut into this rank's micro-batches: PackSpecs, a few hundred bytes each
    workers                  read, verify, decode, collate; they hold no state
    main process             micro-batches in the order of the plan; damages counted against the budget

The number of workers and their prefetch never change the order: the sampler fixes it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from shards.collate import Batch, DecodedSample, collate, decode_sample
from shards.layout import VisualLayout
from shards.plan import Cursor, Draw, PackSpec, Plan
from shards.reader import Damage, ReadError, damage, read_sample
from shards.storage import LocalStorage

LOG = logging.getLogger(__name__)
READS_AT_ONCE = 16  # of one worker, from a bucket
BUDGET = 0.001  # share of a dataset's samples that may be damaged; at least one may, unless strict


class QuarantineError(ValueError):
    """Too many damaged samples; the message lists them."""


class MicroSpec(NamedTuple):
    """One rank's micro-batch of a step, before reading."""

    packs: tuple[PackSpec, ...]
    divisor: float
    cursor: Cursor


def micro_steps(packs_per_step: int, dp_size: int, micro_batch: int) -> int:
    """Micro-batches of one rank in a step.

    Raises:
        ValueError: the ranks cannot share a step's packs equally.
    """
    if packs_per_step % (dp_size * micro_batch):
        raise ValueError(
            f"packs_per_step {packs_per_step} is not a multiple of data-parallel size {dp_size} x micro_batch "
            f"{micro_batch}; change packs_per_step, micro_batch, sp or the number of ranks"
        )
    return packs_per_step // (dp_size * micro_batch)


class PlanSampler(Sampler[MicroSpec]):
    """This rank's micro-batches from a cursor on, without end: rank r takes slots r, r + dp_size, …."""

    def __init__(self, plan: Plan, cursor: Cursor, dp_rank: int, dp_size: int, micro_batch: int) -> None:
        micro_steps(plan.settings.packs_per_step, dp_size, micro_batch)
        self.plan, self.cursor = plan, cursor
        self.dp_rank, self.dp_size, self.micro_batch = dp_rank, dp_size, micro_batch

    def __iter__(self) -> Iterator[MicroSpec]:
        cursor = self.cursor
        while True:
            step = self.plan.step(cursor)
            own = step.packs[self.dp_rank :: self.dp_size]
            for first in range(0, len(own), self.micro_batch):
                yield MicroSpec(own[first : first + self.micro_batch], step.divisor, step.cursor)
            cursor = step.cursor


@functools.lru_cache(maxsize=1)
def _threads(pid: int) -> ThreadPoolExecutor:
    """This process's threads for reading: they do not survive a fork."""
    return ThreadPoolExecutor(READS_AT_ONCE, "read")


class PackReader(TorchDataset[Batch]):
    """Map-style: a MicroSpec in, a batch out. Runs in the workers, and holds no index."""

    def __init__(self, plan: Plan, layout: VisualLayout) -> None:
        self.tars, self.layout = tuple(dataset.tars for dataset in plan.datasets), layout
        self.sequence_length = plan.settings.sequence_length

    def __getitem__(self, spec: MicroSpec) -> Batch:
        draws = [draw for pack in spec.packs for draw in pack.draws]
        # A local read is over before a thread would begin it; a bucket answers many at once.
        remote = any(not isinstance(self.tars[draw.dataset].storage, LocalStorage) for draw in draws)
        found = iter(_threads(os.getpid()).map(self._read, draws) if remote else map(self._read, draws))
        samples = [[next(found) for _ in pack.draws] for pack in spec.packs]
        return collate(self.layout, spec.packs, samples, self.sequence_length, spec.divisor, spec.cursor)

    def without(self, spec: MicroSpec, damages: Iterable[Damage]) -> Batch:
        """The batch with these samples masked too, which another reader found damaged."""
        known = {(found.dataset, found.shard, found.row): found for found in damages}

        def read(draw: Draw) -> DecodedSample | Damage:
            tars = self.tars[draw.dataset]
            return known.get((tars.name, tars.shards[draw.shard], draw.row)) or self._read(draw)

        samples = [[read(draw) for draw in pack.draws] for pack in spec.packs]
        return collate(self.layout, spec.packs, samples, self.sequence_length, spec.divisor, spec.cursor)

    def _read(self, draw: Draw) -> DecodedSample | Damage:
        tars = self.tars[draw.dataset]
        sample = read_sample(tars, draw)
        if isinstance(sample, Damage):
            return sample
        try:
            return decode_sample(self.layout, draw, sample)
        except ReadError as error:  # the checksum held, so it was built wrong: reading it again would not help
            return damage(tars, draw, sample.key, str(error))


class Quarantine:
    """Damages seen so far, against each dataset's budget."""

    def __init__(self, sizes: dict[str, int], strict: bool) -> None:
        self.allowed = {name: 0 if strict else max(1, int(size * BUDGET)) for name, size in sizes.items()}
        self.seen: dict[tuple[str, str, int], Damage] = {}

    def add(self, damages: tuple[Damage, ...]) -> None:
        """Record damages; the same sample counts once.

        Raises:
            QuarantineError: more than a dataset's budget.
        """
        for found in damages:
            if (place := (found.dataset, found.shard, found.row)) not in self.seen:
                self.seen[place] = found
                LOG.warning("masked: %s", found)
        for name, count in Counter(dataset for dataset, _, _ in self.seen).items():
            if count > self.allowed[name]:
                listed = "\n  ".join(str(seen) for seen in self.seen.values() if seen.dataset == name)
                raise QuarantineError(
                    f"{count} damaged samples in {name}, {self.allowed[name]} allowed:\n  {listed}\n"
                    "check the shards with tools/verify_shards.py and fetch or build them again"
                )


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)


def make_loader(
    plan: Plan,
    cursor: Cursor,
    layout: VisualLayout,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    micro_batch: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    strict: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's micro-batches from `cursor` on, without end; `micro_steps` of them make one step.

    The ranks of a sequence-parallel group pass the same `dp_rank`. `prefetch` counts micro-batches per worker. The
    workers end when the generator is closed.

    Raises:
        ValueError: the ranks cannot share a step's packs equally.
        QuarantineError: while iterating, when a dataset has more damaged samples than its budget.
    """
    loader = DataLoader(
        PackReader(plan, layout),
        batch_size=None,
        sampler=PlanSampler(plan, cursor, dp_rank, dp_size, micro_batch),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # workers are given a seed; without this it is drawn from torch's global generator
    )
    quarantine = Quarantine({dataset.name: len(dataset) for dataset in plan.datasets}, strict)

    def batches() -> Generator[Batch, None, None]:
        for batch in loader:
            quarantine.add(batch.masked)
            yield batch

    return batches()
