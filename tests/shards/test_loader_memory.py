"""Memory of the loader and its workers over 4,000 batches; LOADER_BATCHES=20000 for the figure in docs/log.md.

The loader runs in a fresh process: what the tests before left in this one (free lists, arenas) is not its own.
"""

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
from toy import LAYOUT, write_dataset

from shards.loader import make_loader
from shards.mixture import MixtureSpec
from shards.plan import Cursor, PlanSettings, open_plan

BATCHES = int(os.environ.get("LOADER_BATCHES", "4000"))
LOOKS = 20  # how often memory is read; the first fifth warms caches and arenas and is not counted
MOST_GROWTH = 2 << 20  # bytes of a process; a leak of 1,100 bytes a batch would be more


def held(processes: list[psutil.Process]) -> list[int]:
    gc.collect()
    return [process.memory_full_info().uss for process in processes]


def memory_seen(folder: str) -> list[tuple[int, ...]]:
    """For each process (the loader's own, then its workers) the bytes it alone holds, at LOOKS moments."""
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"text": None}}}})
    settings = PlanSettings(sequence_length=128, max_crops=8, packs_per_step=4, window=256)
    before = {process.pid for process in psutil.Process().children()}
    loader = make_loader(open_plan([folder], mixture, settings), Cursor(), LAYOUT, workers=2)
    looks: list[list[int]] = []
    try:
        for number, _ in enumerate(loader, start=1):
            if number % (BATCHES // LOOKS) == 0:
                workers = [each for each in psutil.Process().children() if each.pid not in before]
                looks.append(held([psutil.Process(), *workers]))
            if number == BATCHES:
                break
    finally:
        loader.close()
    return list(zip(*looks, strict=True))


@pytest.mark.timeout(300)
def test_memory_is_flat(tmp_path: Path) -> None:
    write_dataset(tmp_path, "text", 30)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seen = pool.submit(memory_seen, str(tmp_path)).result()
    assert len(seen) >= 3
    for process in seen:
        # The least of several looks: a leak lifts it, an allocator that has not yet given back does not.
        early, late = process[LOOKS // 5 : LOOKS // 2], process[-LOOKS // 4 :]
        assert min(late) - min(early) < MOST_GROWTH, process
