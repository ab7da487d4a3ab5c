"""The loaders of 64 ranks in one process: their packs are the plan's steps, and a further rank needs little memory."""

import dataclasses
import gc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pack_digests import by_slot
from toy import LAYOUT, PROCESSOR, VARIANTS, make_sample, write_index

from shards.build.writer import npy_bytes, row_facts, write_shard
from shards.split import split_visuals
from shards.stream.balance import PackCost
from shards.stream.collate import Batch
from shards.stream.loader import make_loader, micro_steps
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Plan, PlanSettings, open_plan

RANKS = 64
SAMPLES, REPEATS = 30, 10_000  # samples of a dataset, and how often its sidecar lists them
MIXTURE = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"one": None, "two": None}}}})
SETTINGS = PlanSettings(sequence_length=256, max_crops=12, packs_per_step=RANKS, window=512, seed=3)
COST = PackCost(token=1, crop=50, pair=0.01)  # any that tells packs apart, so that they are dealt
# Bytes that one more rank may hold: the draws of its windows, a batch and the loader. Copied sidecars would be 32 MB.
MOST_PER_RANK = 2 << 20
Steps = list[dict[int, str]]  # for each step the digest of every pack


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets whose sidecars are as long as those of large ones: they list every sample `REPEATS` times."""
    root = tmp_path_factory.mktemp("many")
    for name in ("one", "two"):
        (folder := root / name).mkdir()
        samples = [make_sample(name, number) for number in range(SAMPLES)]
        info, rows = write_shard(folder / "000000.tar", "000000", samples, LAYOUT, VARIANTS)
        rows = np.tile(rows, REPEATS)
        (folder / "000000.idx.npy").write_bytes(data := npy_bytes(rows))
        assert len(data) > 4 * MOST_PER_RANK  # a copy could not go unseen
        write_index(folder, [info.model_copy(update=row_facts(rows, data))], VARIANTS, PROCESSOR)
    return root


def open_anew(root: Path) -> Plan:
    """The plan, as every rank opens its own."""
    return open_plan([str(root)], MIXTURE, SETTINGS)


@pytest.fixture(scope="module")
def wanted(root: Path) -> Steps:
    """Four steps on one rank, each in one micro-batch."""
    batches = make_loader(open_anew(root), Cursor(), LAYOUT, micro_batch=RANKS)
    return [by_slot(batch) for batch in itertools.islice(batches, 4)]


def own_bytes() -> int:
    """Memory of this process that no file backs: mapped sidecars are in the page cache, once for all ranks."""
    gc.collect()
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def joined(parts: Sequence[Batch]) -> Batch:
    """The batch of a group, whose ranks must agree on all but the pixels, of which each has those of its split."""
    first, *others = parts
    for other in others:
        assert (other.step, other.slots, other.divisor) == (first.step, first.slots, first.divisor)
        assert (other.cursor, other.masked, other.work) == (first.cursor, first.masked, first.work)
        for name, tensor in first.tensors().items():
            assert name == "pixels" or torch.equal(other.tensors()[name], tensor), name
    splits = split_visuals(first.visual_crops.tolist(), first.visual_tokens.tolist(), len(parts))
    pixels = first.pixels.new_zeros((int(first.visual_crops.sum()), *first.pixels.shape[1:]))
    for split, part in zip(splits, parts, strict=True):
        pixels[torch.from_numpy(split.crops)] = part.pixels
    return dataclasses.replace(first, pixels=pixels)


def steps_of(root: Path, state: dict | None, count: int, dp: int, sp: int) -> Steps:
    """Steps of all ranks, each of which has its own plan and loader; all loaders stay open."""
    ranks: list[Iterator[Batch]] = []
    cursors: list[Cursor] = []
    warm, before = RANKS // 4, 0  # the first ranks fill caches of the process
    for dp_rank, sp_rank in itertools.product(range(dp), range(sp)):
        before = own_bytes() if len(ranks) == warm else before
        plan = open_anew(root)
        cursors.append(plan.restore(state) if state else Cursor())
        place = {"dp_rank": dp_rank, "dp_size": dp, "sp_rank": sp_rank, "sp_size": sp}
        batches = make_loader(plan, cursors[-1], LAYOUT, cost=COST, **place)
        ranks.append(itertools.chain([next(batches)], batches))
    growth = (own_bytes() - before) / (RANKS - warm)
    assert growth < MOST_PER_RANK, f"{growth / 2**20:.2f} MiB"

    (cursor,), plan = set(cursors), open_anew(root)
    steps: Steps = []
    for _ in range(count):
        spec, slots, digests = plan.step(cursor), [], {}
        for _ in range(micro_steps(SETTINGS.packs_per_step, dp, 1)):
            batches = [next(rank) for rank in ranks]
            for group in zip(*(batches[rank::sp] for rank in range(sp)), strict=True):
                batch = joined(group)
                assert (batch.step, batch.divisor, batch.cursor) == (spec.step, spec.divisor, spec.cursor)
                slots += batch.slots
                digests |= by_slot(batch)
        assert sorted(slots) == list(range(RANKS))  # every pack of the step, none twice
        steps.append(digests)
        cursor = spec.cursor
    return steps


@pytest.mark.slow
def test_ranks_draw_the_steps_of_the_plan(root: Path, wanted: Steps) -> None:
    assert steps_of(root, None, 3, dp=RANKS, sp=1) == wanted[:3]


@pytest.mark.slow
def test_ranks_that_share_packs_go_on_from_another_world_size(root: Path, wanted: Steps) -> None:
    """From a state that any rank of the first run could have saved, after two steps."""
    plan = open_anew(root)
    state = plan.state(plan.step(plan.step(Cursor()).cursor).cursor)
    assert steps_of(root, state, 2, dp=RANKS // 4, sp=4) == wanted[2:]
