"""Memory of the loader and its workers over 4,000 batches; LOADER_BATCHES=20000 for the figure in docs/log.md."""

import gc
import os
from pathlib import Path

import psutil
import pytest
from toy import LAYOUT, write_dataset

from shards.loader import make_loader
from shards.mixture import MixtureSpec
from shards.plan import Cursor, PlanSettings, open_plan

BATCHES = int(os.environ.get("LOADER_BATCHES", "4000"))
WARM = BATCHES // 4
MOST_GROWTH = 2 << 20  # bytes of a process; a leak of 700 bytes a batch would be more


def held(processes: list[psutil.Process]) -> list[int]:
    gc.collect()
    return [process.memory_full_info().uss for process in processes]


@pytest.mark.timeout(300)
def test_memory_is_flat(tmp_path: Path) -> None:
    write_dataset(tmp_path, "text", 30)
    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"text": None}}}})
    settings = PlanSettings(sequence_length=128, max_crops=8, packs_per_step=4, window=256)
    before = {process.pid for process in psutil.Process().children()}
    loader = make_loader(open_plan([str(tmp_path)], mixture, settings), Cursor(), LAYOUT, workers=2)
    try:
        for number, _ in enumerate(loader, start=1):
            if number == WARM:
                workers = [each for each in psutil.Process().children() if each.pid not in before]
                processes = [psutil.Process(), *workers]
                warm = held(processes)
            if number == BATCHES:
                break
        growth = [after - first for first, after in zip(warm, held(processes), strict=True)]
    finally:
        loader.close()
    assert len(growth) >= 3
    assert max(growth) < MOST_GROWTH, growth
