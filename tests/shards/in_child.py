"""What tests run in child processes that are not forked: such a child imports this module by its name."""

import gc
import time
from typing import Any

import psutil


def fail(pixels: Any) -> None:
    """Fail as a function that is handed a frame may."""
    raise ValueError("not a JPEG")


def sleep(ref: Any) -> None:
    """Take longer than any deadline."""
    time.sleep(60)


def held(processes: list[psutil.Process]) -> list[int]:
    """Bytes that each process alone holds."""
    gc.collect()
    return [process.memory_full_info().uss for process in processes]


def memory_seen(folder: str, num_batches: int, num_looks: int) -> list[tuple[int, ...]]:
    """For each process (the loader's own, then its workers) the bytes it alone holds, at `num_looks` moments."""
    from toy import LAYOUT  # here, since decoding processes import this module as well

    from shards.stream.loader import make_loader
    from shards.stream.mixture import MixtureSpec
    from shards.stream.plan import Cursor, PlanSettings, open_plan

    mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"text": None}}}})
    settings = PlanSettings(sequence_length=128, max_crops=8, packs_per_step=4, window=256)
    before = {process.pid for process in psutil.Process().children()}
    loader = make_loader(open_plan([folder], mixture, settings), Cursor(), LAYOUT, workers=2)
    looks: list[list[int]] = []
    try:
        for number, _ in enumerate(loader, start=1):
            if number % (num_batches // num_looks) == 0:
                workers = [each for each in psutil.Process().children() if each.pid not in before]
                looks.append(held([psutil.Process(), *workers]))
            if number == num_batches:
                break
    finally:
        loader.close()
    return list(zip(*looks, strict=True))
