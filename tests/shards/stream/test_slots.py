"""Batches that workers build in shared slots: equal to others, never overwritten while in use, and free afterwards."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy import LAYOUT, write_dataset

from shards.stream.collate import Batch
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Plan, PlanSettings, open_plan
from shards.stream.slots import KEPT

MIXTURE = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"toy": None}}}})
PREFETCH = 2


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_dataset(tmp_path, "toy", 40)
    settings = PlanSettings(sequence_length=512, max_crops=64, packs_per_step=2, window=16)
    return open_plan([str(tmp_path)], MIXTURE, settings)


def batches(plan: Plan, workers: int) -> Iterator[Batch]:
    return make_loader(plan, Cursor(), LAYOUT, micro_batch=2, workers=workers, prefetch=PREFETCH)


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert (one.cursor, one.slots, one.work) == (other.cursor, other.slots, other.work)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_consumer_that_keeps_every_batch_gets_what_one_process_reads(plan: Plan, workers: int) -> None:
    """More than there are slots: the others come by value."""
    count = 3 * workers * (PREFETCH + KEPT)
    kept = list(itertools.islice(batches(plan, workers), count))
    for one, other in zip(kept, batches(plan, 0), strict=False):
        assert_equal(one, other)


def test_slots_are_used_again_when_nothing_refers_to_them(plan: Plan) -> None:
    wanted, places = batches(plan, 0), set()
    for batch in itertools.islice(batches(plan, 1), 20):
        assert_equal(batch, next(wanted))
        places.add(batch.input_ids.untyped_storage().data_ptr())
        assert batch.input_ids.untyped_storage().data_ptr() == batch.pixels.untyped_storage().data_ptr()
    assert len(places) <= PREFETCH + KEPT


def test_a_part_of_a_batch_keeps_its_slot(plan: Plan) -> None:
    loader = batches(plan, 1)
    row = next(loader).input_ids[1]  # a view; its batch is gone
    expected = row.clone()
    for batch in itertools.islice(loader, 20):
        assert batch.input_ids.untyped_storage().data_ptr() != row.untyped_storage().data_ptr()
    assert torch.equal(row, expected)


def test_nothing_of_a_batch_needs_dev_shm(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are forked, so that their shared memory is full, too."""

    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    for name in ("share_memory_", "_share_filename_cpu_", "_share_fd_cpu_"):
        for owner in (torch.Tensor, torch.UntypedStorage):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, full)
    kept = list(itertools.islice(batches(plan, 1), 12))
    assert len(kept) == 12
