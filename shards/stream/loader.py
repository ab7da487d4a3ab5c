"""The data loader: plan -> reader -> collate, in worker processes.

    sampler (main process)   cuts the steps of the plan into this rank's micro-batches (MicroSpec: what to read)
    workers                  read, verify, decode and collate; they hold no state
    main process             yields micro-batches in the order of the plan, and counts damaged samples (quarantine)

The sampler fixes the order, so the number of workers and their prefetch never change it.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from shards.layout import VisualLayout
from shards.storage.base import UnavailableError, take_tally
from shards.storage.local import LocalStorage
from shards.stream.balance import SAME_COST, PackCost, own_packs
from shards.stream.collate import (
    Arena,
    Batch,
    OpenedSample,
    ReadStats,
    collate,
    decode_crops,
    make_pixels,
    odd_weights,
    open_sample,
    own_visuals,
)
from shards.stream.dataset import Dataset, Tars
from shards.stream.plan import Cursor, Draw, Plan
from shards.stream.read_ahead import MicroSpec, ReadAhead, look_ahead
from shards.stream.reader import DAMAGE_BUDGET, Damage, ReadError, read_sample, to_damage
from shards.stream.slots import SharedBatch, SlotRing, batch_bytes, share

LOG = logging.getLogger(__name__)
READ_AHEAD = 256 << 20  # bytes of samples that a rank reads from a bucket before they are needed
Timed = Sequence[tuple[OpenedSample | Damage, float]]  # samples, each with the seconds that reading it took


class QuarantineError(ValueError):
    """A dataset has more damaged samples than its budget; the message lists them."""


def micro_steps(packs_per_step: int, dp_size: int, micro_batch: int) -> int:
    """Number of micro-batches of one rank in a step (gradient accumulation steps).

    Raises:
        ValueError: the packs of a step cannot be divided equally among the ranks.
    """
    if packs_per_step % (dp_size * micro_batch):
        raise ValueError(
            f"packs_per_step {packs_per_step} is not a multiple of data-parallel size {dp_size} x micro_batch "
            f"{micro_batch}; change packs_per_step, micro_batch, sp or the number of ranks"
        )
    return packs_per_step // (dp_size * micro_batch)


class PlanSampler(Sampler[MicroSpec]):
    """Endless sampler of this rank's micro-batches from a cursor on; the packs of a step are dealt to ranks by `cost`.

    `lanes` and `read_ahead`: see `look_ahead`. `ring`: of which each micro-batch gets a slot of its worker.
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
        cost: PackCost = SAME_COST,
        ring: SlotRing | None = None,
    ) -> None:
        micro_steps(plan.settings.packs_per_step, dp_size, micro_batch)
        self.plan, self.cursor = plan, cursor
        self.dp_rank, self.dp_size, self.micro_batch = dp_rank, dp_size, micro_batch
        self.lanes, self.read_ahead, self.cost, self.ring = lanes, read_ahead, cost, ring

    def __iter__(self) -> Iterator[MicroSpec]:
        specs = look_ahead(self._specs(), self.lanes, self.read_ahead)
        if self.ring is None:
            return specs
        return (spec._replace(slot=self.ring.take(number % self.lanes)) for number, spec in enumerate(specs))

    def _specs(self) -> Iterator[MicroSpec]:
        cursor = self.cursor
        while True:
            step = self.plan.step(cursor)
            length = self.plan.settings.sequence_length
            own = own_packs(step, self.cost, length, self.dp_rank, self.dp_size, self.micro_batch)
            for first in range(0, len(own), self.micro_batch):
                yield MicroSpec(own[first : first + self.micro_batch], step.divisor, step.cursor)
            cursor = step.cursor


class PackReader(TorchDataset[Batch | SharedBatch | UnavailableError]):
    """Map-style dataset that turns a MicroSpec into a batch. It runs in the workers and holds no index.

    Args:
        tars: the tars of the plan's datasets, in the plan's order.
        layout: the model's geometry.
        sequence_length: tokens of a row.
        share: (rank, ranks) in the sequence-parallel group: only the visuals of this rank's split are decoded.
    """

    ring: SlotRing | None = None  # the memory in which workers build batches

    def __init__(
        self, tars: Sequence[Tars], layout: VisualLayout, sequence_length: int, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.tars, self.layout, self.sequence_length, self.share = tuple(tars), layout, sequence_length, share
        self.ahead = ReadAhead(self._read)

    def __getitem__(self, spec: MicroSpec) -> Batch | SharedBatch | UnavailableError:
        """The batch, or why there is none: an exception would reach the main process as a traceback."""
        try:
            batch = self.read(spec)
        except UnavailableError as error:
            return error
        return batch if self.ring is None else share(batch, self.ring, spec.slot)

    def read(self, spec: MicroSpec) -> Batch:
        """Read, verify, decode and collate a micro-batch.

        Raises:
            UnavailableError: a storage does not answer, refuses or is gone.
        """
        if self.remote:  # a bucket serves many concurrent reads
            draws = (*spec.draws, *spec.ahead)
            self.ahead.begin(draw for draw in draws if not self.tars[draw.dataset].is_near(draw.shard))
        return self._batch(spec, [self.ahead.take(draw) for draw in spec.draws])

    @property
    def remote(self) -> bool:
        """Whether any dataset is not on a local disk."""
        return any(not isinstance(tars.storage, LocalStorage) for tars in self.tars)

    def without(self, spec: MicroSpec, damages: Iterable[Damage]) -> Batch:
        """Read a batch in which samples that another reader found damaged are masked too."""
        known = {(item.dataset, item.shard, item.row): item for item in damages}

        def read(draw: Draw) -> tuple[OpenedSample | Damage, float]:
            tars = self.tars[draw.dataset]
            damaged = known.get((tars.name, tars.shards[draw.shard], draw.row))
            return (damaged, 0.0) if damaged else self._read(draw)

        return self._batch(spec, [read(draw) for draw in spec.draws])

    def _read(self, draw: Draw) -> tuple[OpenedSample | Damage, float]:
        """Read a sample, its images still JPEG, or report its damage; and the seconds that this took."""
        since, tars = time.perf_counter(), self.tars[draw.dataset]
        sample = read_sample(tars, draw)
        if isinstance(sample, Damage):
            return sample, time.perf_counter() - since
        try:
            return open_sample(self.layout, draw, sample), time.perf_counter() - since
        except ReadError as error:  # its checksum is right, so a retry would not help: it was built wrong
            return to_damage(tars, draw, sample.key, str(error)), time.perf_counter() - since

    def _batch(self, spec: MicroSpec, timed: Timed) -> Batch:
        """Decode and collate samples; `timed` holds each with the seconds that reading it took."""
        samples, seconds = [sample for sample, _ in timed], []
        arena = Arena(None if self.ring is None or spec.slot is None else self.ring.slots[spec.slot])
        opened = [sample for sample in samples if isinstance(sample, OpenedSample)]
        for sample in odd_weights(opened) if opened else ():
            return self._batch(spec, self._masked(timed, sample, "loss weights that are not those of the index"))
        own = list(own_visuals(opened, *self.share))
        counts = [sum(sample.num_crops[number] for number in visuals) for sample, visuals in own]
        pixels, start = make_pixels(self.layout, sum(counts), arena), 0
        for (sample, visuals), count in zip(own, counts, strict=True):
            since = time.perf_counter()
            try:
                decode_crops(self.layout, sample.stored, visuals, pixels[start : start + count])
            except ReadError as error:  # without this sample the splits differ: begin again
                return self._batch(spec, self._masked(timed, sample, str(error)))
            start += count
            seconds.append(time.perf_counter() - since)
        reads = ReadStats(tuple(taken for _, taken in timed), tuple(seconds), take_tally())
        return collate(
            *(self.layout, spec.packs, samples, pixels), self.sequence_length, spec.divisor, spec.cursor, reads, arena
        )

    def _masked(self, timed: Timed, sample: OpenedSample, reason: str) -> Timed:
        """The same samples with a `Damage` in place of one."""
        damage = to_damage(self.tars[sample.draw.dataset], sample.draw, sample.stored.key, reason)
        return [(damage if item is sample else item, taken) for item, taken in timed]


def pack_reader(plan: Plan, layout: VisualLayout, share: tuple[int, int] = (0, 1), cache: int = 0) -> PackReader:
    """The reader of a plan's packs; `share` as in `PackReader`, `cache` as in `make_loader`."""
    from shards.stream.cache import with_cache

    return PackReader(with_cache(plan.datasets, cache), layout, plan.settings.sequence_length, share)


class Quarantine:
    """The damaged samples so far, counted against each dataset's budget.

    Args:
        datasets: the datasets of the plan.
        budget: the fraction of a dataset's samples that may be damaged; one sample may, unless it is 0.
        damages: samples that were found before, which are not reported again.
    """

    def __init__(self, datasets: Iterable[Dataset], budget: float, damages: Iterable[Damage] = ()) -> None:
        self.allowed = {dataset.name: max(1, int(len(dataset) * budget)) if budget else 0 for dataset in datasets}
        self.damages = {_place(damage): damage for damage in damages}

    def add(self, damages: Iterable[Damage]) -> None:
        """Record damaged samples; the same sample counts once.

        Raises:
            QuarantineError: a dataset has more of them than its budget.
        """
        for damage in damages:
            if _place(damage) not in self.damages:
                self.damages[_place(damage)] = damage
                LOG.warning("masked: %s", damage)
        for name, count in Counter(damage.dataset for damage in self.damages.values()).items():
            if count > self.allowed.get(name, count):  # a dataset may have left the mixture
                listed = "\n  ".join(str(damage) for damage in self.damages.values() if damage.dataset == name)
                raise QuarantineError(
                    f"{count} damaged samples in {name}, {self.allowed[name]} allowed:\n  {listed}\n"
                    "check the shards with tools/verify_shards.py and fetch or build them again; data.damage_budget "
                    "sets the fraction of a dataset that may be damaged"
                )


def _place(damage: Damage) -> tuple[str, str, int]:
    return damage.dataset, damage.shard, damage.row


def _start_worker(_: int) -> None:
    """Set up a worker: one thread, and deaf to the signals that stop a run.

    Launchers signal the process group or every process below a rank. The rank finishes its step and saves, for which it
    needs its workers; it ends them itself.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
    cost: PackCost = SAME_COST,
    damage_budget: float | None = DAMAGE_BUDGET,
) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches from `cursor` on, without end; `micro_steps` of them make one step.

    The workers end when the generator is closed.

    Args:
        plan: the plan of the run.
        cursor: the state of the data to start or resume from.
        layout: the model's geometry.
        dp_rank: data-parallel rank; all ranks of a sequence-parallel group pass the same one.
        dp_size: data-parallel size: number of sequence-parallel groups.
        sp_rank: rank in the sequence-parallel group; it selects the split of images and frames to decode.
        sp_size: number of ranks of a sequence-parallel group.
        micro_batch: packs of a micro-batch.
        workers: number of worker processes; 0 reads in this process.
        prefetch: decoded micro-batches that each worker holds ready.
        read_ahead: bytes of stored samples that this rank reads from a bucket before they are needed.
        cache: bytes of small datasets from a bucket that this machine may cache on its disk, as whole shards.
        cost: cost of a pack, by which the packs of a step are dealt to the ranks; all ranks pass the same one.
        damage_budget: see `Quarantine`, for the samples of this rank; None leaves counting to the caller.

    Raises:
        ValueError: the packs of a step cannot be divided equally among the ranks.
        QuarantineError: while iterating, when a dataset has more damaged samples than its budget.
        UnavailableError: while iterating, when a storage does not answer, refuses or is gone.
    """
    reader = pack_reader(plan, layout, (sp_rank, sp_size), cache)
    ahead = read_ahead if reader.remote else 0
    if workers:
        reader.ring = SlotRing(workers, prefetch, batch_bytes(layout, plan.settings, micro_batch))
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=PlanSampler(plan, cursor, dp_rank, dp_size, micro_batch, max(1, workers), ahead, cost, reader.ring),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # workers inherit the slots
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # seeds of workers; else they are drawn from torch's global generator
    )
    quarantine = None if damage_budget is None else Quarantine(plan.datasets, damage_budget)

    def batches() -> Generator[Batch, None, None]:
        others = set(multiprocessing.active_children())
        iterator = iter(loader)
        started = set(multiprocessing.active_children()) - others
        try:
            for batch in iterator:
                if isinstance(batch, UnavailableError):
                    raise batch
                if quarantine is not None:
                    quarantine.add(batch.masked)
                # No name for an opened batch here: it would hold the slot until the next batch has come.
                yield batch.open() if isinstance(batch, SharedBatch) else batch
        finally:
            reader.ahead.close()
            del iterator  # asks the workers to end, and waits for each for five seconds
            for worker in started:
                worker.kill()  # one that is stuck in a read; it ignores SIGTERM

    return batches()
