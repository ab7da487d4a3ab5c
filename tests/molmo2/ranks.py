"""Starts real ranks (gloo, CPU) for a test: `run_ranks(world, function, argument)`."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world: int, folder: str, function: Callable[[Any], Any], argument: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(argument), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[[Any], Any], argument: Any = None) -> list[Any]:
    """What `function(argument)` returned on each rank. The function must be importable: a module beside the tests."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[no-untyped-call]
            _rank, args=(world, folder, function, argument), nprocs=world, start_method="spawn"
        )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]
