"""The loader: equal steps whatever the ranks, workers and interruptions, and a budget for damaged samples."""

import dataclasses
import gc
import itertools
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack_digests import by_slot
from toy import LAYOUT, write_dataset

import shards.stream.collate
import shards.stream.reader
from shards.split import split_visuals
from shards.storage.base import UnavailableError
from shards.storage.local import LocalStorage
from shards.stream.collate import Batch
from shards.stream.loader import PlanSampler, QuarantineError, make_loader, micro_steps, pack_reader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Plan, PlanSettings, open_plan

MIXTURE = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"big": None, "small": None}}}})
SETTINGS = PlanSettings(sequence_length=1000, max_crops=24, packs_per_step=16, window=128, seed=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    write_dataset(root, "big", 40)
    write_dataset(root, "small", 7)
    return root


@pytest.fixture(scope="module")
def plan(root: Path) -> Plan:
    return open_plan([str(root)], MIXTURE, SETTINGS)


def steps_of(plan: Plan, cursor: Cursor, count: int, dp: int, micro: int, **options: Any) -> list[dict[int, str]]:
    """The slots of `count` steps, gathered from all ranks; their cursors and divisors must agree."""
    steps: list[dict[int, str]] = [{} for _ in range(count)]
    for rank in range(dp):
        batches = make_loader(plan, cursor, LAYOUT, dp_rank=rank, dp_size=dp, micro_batch=micro, **options)
        after = cursor
        for step in steps:
            spec = plan.step(after)
            for batch in itertools.islice(batches, micro_steps(SETTINGS.packs_per_step, dp, micro)):
                assert (batch.step, batch.divisor, batch.cursor) == (spec.step, spec.divisor, spec.cursor)
                step.update(by_slot(batch))
            after = spec.cursor
    return steps


@pytest.fixture(scope="module")
def wanted(plan: Plan) -> list[dict[int, str]]:
    """Five steps on one rank, one pack at a time."""
    return steps_of(plan, Cursor(), 5, dp=1, micro=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize(
    ("dp", "micro", "workers", "prefetch"),
    [(1, 16, 0, 2), (2, 4, 0, 2), (16, 1, 0, 2), (4, 2, 1, 1), (2, 2, 3, 2), (1, 2, 2, 5)],
)
def test_equal_steps_on_any_ranks_and_workers(
    plan: Plan, wanted: list[dict[int, str]], dp: int, micro: int, workers: int, prefetch: int
) -> None:
    count = 2 if workers else 3
    assert steps_of(plan, Cursor(), count, dp, micro, workers=workers, prefetch=prefetch) == wanted[:count]


def test_ranks_of_an_sp_group_hold_the_same_batches(plan: Plan) -> None:
    """Ranks 2 and 3 of dp 4 x sp 2 are both dp rank 1: equal but for the pixels, of which each has a part."""
    whole = make_loader(plan, Cursor(), LAYOUT, dp_rank=1, dp_size=4)
    shared = [
        make_loader(plan, Cursor(), LAYOUT, dp_rank=1, dp_size=4, sp_rank=rank, sp_size=2, workers=rank)
        for rank in (0, 1)
    ]
    for one, *parts in itertools.islice(zip(whole, *shared, strict=True), 6):
        splits = split_visuals(one.visual_crops.tolist(), one.visual_tokens.tolist(), 2)
        pixels = torch.empty_like(one.pixels)
        for split, part in zip(splits, parts, strict=True):
            pixels[torch.from_numpy(split.crops)] = part.pixels
        assert abs(len(parts[0].pixels) - len(parts[1].pixels)) <= int(one.visual_crops.max())
        assert all(by_slot(dataclasses.replace(part, pixels=pixels)) == by_slot(one) for part in parts)


def test_of_a_shared_pack_only_the_own_images_are_decoded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [0, 0, 0], shards.stream.collate.decode_jpeg
    for number, share in enumerate([(0, 1), (0, 2), (1, 2)]):

        def count(data: bytes, into: Any = None, number: int = number) -> Any:
            decoded[number] += 1
            return decode(data, into)

        monkeypatch.setattr(shards.stream.collate, "decode_jpeg", count)
        list(itertools.islice(make_loader(plan, Cursor(), LAYOUT, sp_rank=share[0], sp_size=share[1]), 20))
    assert decoded[0] == decoded[1] + decoded[2] and 0.3 < decoded[1] / decoded[0] < 0.7


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_and_continued_otherwise(
    root: Path, plan: Plan, wanted: list[dict[int, str]], seed: int
) -> None:
    """Stop in mid-step with batches in flight; go on from the last whole step, on other ranks and workers."""
    rng = np.random.Generator(np.random.Philox(seed))
    dp, micro = (int(2 ** rng.integers(0, 3)) for _ in range(2))
    per_step = micro_steps(SETTINGS.packs_per_step, dp, micro)
    taken = int(rng.integers(1, 4 * per_step))
    batches = make_loader(
        plan, Cursor(), LAYOUT, dp_size=dp, micro_batch=micro, workers=int(rng.integers(0, 3)), prefetch=3
    )
    seen = list(itertools.islice(batches, taken))
    batches.close()
    done = taken // per_step
    cursor = seen[done * per_step - 1].cursor if done else Cursor()
    state = plan.state(cursor)
    fresh = open_plan([str(root)], MIXTURE, SETTINGS)
    dp, micro = (int(2 ** rng.integers(0, 3)) for _ in range(2))
    assert steps_of(fresh, fresh.restore(state), 5 - done, dp, micro) == wanted[done:]


@pytest.mark.slow
@given(data=st.data())
def test_ranks_share_every_step_without_gap(plan: Plan, data: st.DataObject) -> None:
    """dp 1-16, any micro-batch, from any cursor: specs only, so many cases."""
    dp = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    micro = data.draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if dp * n <= 16]))
    cursor = Cursor(step=data.draw(st.integers(0, 10**6)), window=data.draw(st.integers(0, 10**6)))
    count = micro_steps(16, dp, micro)
    ranks = [list(itertools.islice(PlanSampler(plan, cursor, rank, dp, micro), 2 * count)) for rank in range(dp)]
    first = plan.step(cursor)
    for part, step in ((slice(0, count), first), (slice(count, None), plan.step(first.cursor))):
        specs = [spec for rank in ranks for spec in rank[part]]
        packs = sorted((pack for spec in specs for pack in spec.packs), key=lambda pack: pack.slot)
        assert tuple(packs) == step.packs
        assert {(spec.divisor, spec.cursor) for spec in specs} == {(step.divisor, step.cursor)}


def test_weights_of_a_step_sum_to_its_divisor(plan: Plan) -> None:
    batches = list(itertools.islice(make_loader(plan, Cursor(), LAYOUT, micro_batch=4), 4))
    total = sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in batches)
    assert total == pytest.approx(batches[0].divisor, rel=1e-6)


def test_resume_reads_only_what_it_trains_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    cursor = plan.step(plan.step(Cursor()).cursor).cursor
    spec = plan.step(cursor)
    ranges, read = [], LocalStorage.read
    monkeypatch.setattr(
        LocalStorage, "read", lambda self, *at: ranges.append((Path(self.root).name, *at)) or read(self, *at)
    )
    list(itertools.islice(make_loader(plan, cursor, LAYOUT, micro_batch=8), 2))
    names = [dataset.name for dataset in plan.datasets]
    draws = [draw for pack in spec.packs for draw in pack.draws]
    assert ranges == [(names[d.dataset], f"{d.shard:06d}.tar", d.offset, d.span) for d in draws]


def test_workers_get_no_index(plan: Plan) -> None:
    """What travels to a worker stays small, however large the datasets are."""
    assert len(pickle.dumps(pack_reader(plan, LAYOUT))) < 2000
    spec = next(iter(PlanSampler(plan, Cursor(), 0, 1, 1)))
    assert len(pickle.dumps(spec)) < 600


def test_workers_end_when_the_iterator_is_closed(plan: Plan) -> None:
    before = {process.pid for process in psutil.Process().children()}
    batches = make_loader(plan, Cursor(), LAYOUT, workers=2)
    next(batches)
    started = [process for process in psutil.Process().children() if process.pid not in before]
    assert len(started) >= 2
    batches.close()
    del batches
    gc.collect()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_ranks_that_cannot_share_a_step_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"packs_per_step 16 .* data-parallel size 3 x micro_batch 2; change"):
        make_loader(plan, Cursor(), LAYOUT, dp_size=3, micro_batch=2)


# --- damaged samples -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes a plan over copies of the datasets with one byte wrong in the given rows of `big`."""
    monkeypatch.setattr(shards.stream.reader, "PAUSE", 0.0)

    def make(*rows: int) -> Plan:
        write_dataset(tmp_path, "big", 40)
        write_dataset(tmp_path, "small", 7)
        plan = open_plan([str(tmp_path)], MIXTURE, SETTINGS)
        for row in rows:
            shard, inside = divmod(row, 16)
            entry = plan.datasets[0].sidecars[shard][inside]
            with open(tmp_path / "big" / f"{shard:06d}.tar", "r+b") as file:
                file.seek(int(entry["offset"] + entry["span"] - 600))
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1]))
        return plan

    yield make


@pytest.mark.parametrize("workers", [0, 2])
def test_one_damaged_sample_is_masked_and_all_else_is_equal(
    damaged: Any, plan: Plan, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    broken = damaged(17)
    pairs = zip(
        make_loader(broken, Cursor(), LAYOUT, micro_batch=4, workers=workers),
        make_loader(plan, Cursor(), LAYOUT, micro_batch=4),
        strict=True,
    )
    masked = 0
    for found, wanted in itertools.islice(pairs, 12):
        assert (found.slots, found.divisor, found.cursor) == (wanted.slots, wanted.divisor, wanted.cursor)
        same = found.segment_ids == wanted.segment_ids
        assert torch.equal(found.input_ids[same], wanted.input_ids[same])
        assert same.all() == (not found.masked)
        masked += len(found.masked)
        assert all((d.dataset, d.shard, d.row) == ("big", "000001", 1) for d in found.masked)
    assert masked > 1, "it was drawn in two epochs, and counted against the budget once"
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and "big/000001.tar, sample 1 (big-00017) at byte" in lines[0]


def test_a_second_damaged_sample_is_above_the_budget(damaged: Any) -> None:
    batches = make_loader(damaged(3, 17), Cursor(), LAYOUT)
    with pytest.raises(QuarantineError) as error:
        list(itertools.islice(batches, 200))
    message = str(error.value)
    assert message.startswith("2 damaged samples in big, 1 allowed:\n")
    assert "big-00003" in message and "big-00017" in message and "tools/verify_shards.py" in message


def test_the_budget_ends_at_the_same_batch_for_any_workers(damaged: Any) -> None:
    plan, ends = damaged(3, 17), []
    for workers in (0, 2):
        batches, count = make_loader(plan, Cursor(), LAYOUT, workers=workers), 0
        with pytest.raises(QuarantineError):
            for _ in batches:
                count += 1
        ends.append(count)
    assert ends[0] == ends[1] > 0


def test_strict_stops_at_the_first(damaged: Any) -> None:
    with pytest.raises(QuarantineError, match="1 damaged samples in big, 0 allowed"):
        list(itertools.islice(make_loader(damaged(3), Cursor(), LAYOUT, damage_budget=0), 200))


def test_a_missing_tar_is_damage_too(damaged: Any, tmp_path: Path) -> None:
    plan = damaged()
    (tmp_path / "small" / "000000.tar").unlink()
    with pytest.raises(QuarantineError, match="No such file"):
        list(itertools.islice(make_loader(plan, Cursor(), LAYOUT), 200))


def toy_loader(root: Path, workers: int) -> Iterator[Batch]:
    write_dataset(root, "toy", 40)
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"toy": None}}}})
    settings = PlanSettings(sequence_length=512, max_crops=64, packs_per_step=1, window=16)
    return make_loader(open_plan([str(root)], mixture, settings), Cursor(), LAYOUT, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_goes_away_ends_the_loader_with_one_error(tmp_path: Path, workers: int) -> None:
    loader = toy_loader(tmp_path, workers)
    assert next(loader).masked == ()
    (tmp_path / "toy").rename(tmp_path / "gone")
    with pytest.raises(UnavailableError) as caught:
        for batch in loader:
            assert batch.masked == ()
    assert "Traceback" not in str(caught.value) and "start again" in str(caught.value)
