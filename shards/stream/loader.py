"""The loader: plan -> reader -> collate, in worker processes.

    sampler (main process)   steps of the plan, cut into this rank's micro-batches: PackSpecs, a few hundred bytes each
    workers                  read, verify, decode, collate; they hold no state
    main process             micro-batches in the order of the plan; damages counted against the budget

The number of workers and their prefetch never change the order: the sampler fixes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from shards.layout import VisualLayout
from shards.storage.base import take_tally
from shards.storage.local import LocalStorage
from shards.stream.collate import Batch, OpenedSample, ReadStats, collate, decode_crops, open_sample, own_visuals
from shards.stream.dataset import Tars, with_cache
from shards.stream.plan import Cursor, Draw, Plan
from shards.stream.read_ahead import MicroSpec, ReadAhead, look_ahead
from shards.stream.reader import Damage, ReadError, damage, read_sample

LOG = logging.getLogger(__name__)
READ_AHEAD = 256 << 20  # bytes
BUDGET = 0.001  # share of a dataset's samples that may be damaged; at least one may, unless strict


class QuarantineError(ValueError):
    """Too many damaged samples; the message lists them."""


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
    """This rank's micro-batches from a cursor on, without end: rank r takes slots r, r + dp_size, ….

    `lanes` and `read_ahead`: see `look_ahead`.
    """

    def __init__(
        self,
        plan: Plan,
        cursor: Cursor,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        lanes: int = 1,
        read_ahead: int = 0,
    ) -> None:
        micro_steps(plan.settings.packs_per_step, dp_size, micro_batch)
        self.plan, self.cursor = plan, cursor
        self.dp_rank, self.dp_size, self.micro_batch = dp_rank, dp_size, micro_batch
        self.lanes, self.read_ahead = lanes, read_ahead

    def __iter__(self) -> Iterator[MicroSpec]:
        return look_ahead(self._specs(), self.lanes, self.read_ahead)

    def _specs(self) -> Iterator[MicroSpec]:
        cursor = self.cursor
        while True:
            step = self.plan.step(cursor)
            own = step.packs[self.dp_rank :: self.dp_size]
            for first in range(0, len(own), self.micro_batch):
                yield MicroSpec(own[first : first + self.micro_batch], step.divisor, step.cursor)
            cursor = step.cursor


class PackReader(TorchDataset[Batch]):
    """Map-style: a MicroSpec in, a batch out. Runs in the workers, and holds no index.

    Args:
        tars: of the plan's datasets, in its order.
        layout: the model's geometry.
        sequence_length: tokens of a row.
        share: (rank, ranks) among those that hold the same packs: only this share of the visuals is decoded.
    """

    def __init__(
        self, tars: Sequence[Tars], layout: VisualLayout, sequence_length: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.tars, self.layout, self.sequence_length, self.share = tuple(tars), layout, sequence_length, share
        self.ahead = ReadAhead(self._read)

    def __getitem__(self, spec: MicroSpec) -> Batch:
        # A local read is over before a thread would begin it; a bucket answers many at once.
        if self.remote:
            self.ahead.begin((*spec.draws, *spec.ahead))
        return self._batch(spec, [self.ahead.take(draw) for draw in spec.draws])

    @property
    def remote(self) -> bool:
        """Whether any dataset is not on a local disk."""
        return any(not isinstance(tars.storage, LocalStorage) for tars in self.tars)

    def without(self, spec: MicroSpec, damages: Iterable[Damage]) -> Batch:
        """The batch with these samples masked too, which another reader found damaged."""
        known = {(found.dataset, found.shard, found.row): found for found in damages}

        def read(draw: Draw) -> tuple[OpenedSample | Damage, float]:
            tars = self.tars[draw.dataset]
            found = known.get((tars.name, tars.shards[draw.shard], draw.row))
            return (found, 0.0) if found else self._read(draw)

        return self._batch(spec, [read(draw) for draw in spec.draws])

    def _read(self, draw: Draw) -> tuple[OpenedSample | Damage, float]:
        """A sample, its images still JPEG, or what is wrong with it; and the seconds that it took."""
        since, tars = time.perf_counter(), self.tars[draw.dataset]
        sample = read_sample(tars, draw)
        if isinstance(sample, Damage):
            return sample, time.perf_counter() - since
        try:
            return open_sample(self.layout, draw, sample), time.perf_counter() - since
        except ReadError as error:  # the checksum held, so it was built wrong: reading it again would not help
            return damage(tars, draw, sample.key, str(error)), time.perf_counter() - since

    def _batch(self, spec: MicroSpec, found: Sequence[tuple[OpenedSample | Damage, float]]) -> Batch:
        samples, crops, seconds = [sample for sample, _ in found], [], []
        opened = [sample for sample in samples if isinstance(sample, OpenedSample)]
        for sample, visuals in own_visuals(opened, *self.share):
            since = time.perf_counter()
            try:
                crops += decode_crops(self.layout, sample.stored, visuals)
            except ReadError as error:  # the shares change with it
                wrong = damage(self.tars[sample.draw.dataset], sample.draw, sample.stored.key, str(error))
                return self._batch(spec, [(wrong if each is sample else each, taken) for each, taken in found])
            seconds.append(time.perf_counter() - since)
        reads = ReadStats(tuple(taken for _, taken in found), tuple(seconds), take_tally())
        return collate(
            *(self.layout, spec.packs, samples, crops), self.sequence_length, spec.divisor, spec.cursor, reads
        )


def pack_reader(plan: Plan, layout: VisualLayout, share: tuple[int, int] = (0, 1), cache: int = 0) -> PackReader:
    """The reader of a plan's packs; see `make_loader` for `cache`."""
    return PackReader(with_cache(plan.datasets, cache), layout, plan.settings.sequence_length, share)


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
    sp_rank: int = 0,
    sp_size: int = 1,
    micro_batch: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    read_ahead: int = READ_AHEAD,
    cache: int = 0,
    strict: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's micro-batches from `cursor` on, without end; `micro_steps` of them make one step.

    The workers end when the generator is closed.

    Args:
        plan: the batches.
        cursor: where to begin.
        layout: the model's geometry.
        dp_rank: which micro-batches; the ranks of a sequence-parallel group pass the same.
        dp_size: number of such groups.
        sp_rank: which share of the group's images and frames is decoded.
        sp_size: ranks of a group.
        micro_batch: packs of a batch.
        workers: processes that read; 0 reads in this one.
        prefetch: decoded micro-batches that each worker holds ready.
        read_ahead: bytes of further samples, as stored, that this rank reads from a bucket before they are needed.
        cache: bytes of whole shards of tiny samples from a bucket that this machine may keep on its disk.
        strict: allow no damaged sample.

    Raises:
        ValueError: the ranks cannot share a step's packs equally.
        QuarantineError: while iterating, when a dataset has more damaged samples than its budget.
    """
    reader = pack_reader(plan, layout, (sp_rank, sp_size), cache)
    ahead = read_ahead if reader.remote else 0
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=PlanSampler(plan, cursor, dp_rank, dp_size, micro_batch, max(1, workers), ahead),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_quiet_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # workers are given a seed; without this it is drawn from torch's global generator
    )
    quarantine = Quarantine({dataset.name: len(dataset) for dataset in plan.datasets}, strict)

    def batches() -> Generator[Batch, None, None]:
        try:
            for batch in loader:
                quarantine.add(batch.masked)
                yield batch
        finally:
            reader.ahead.close()

    return batches()
