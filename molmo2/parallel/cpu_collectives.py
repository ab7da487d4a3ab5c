"""DeepSpeed's own collectives between the ranks of one machine without GPUs: compiled when they are first used."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.ops.op_builder import ShareMemCommBuilder
from torch.utils import cpp_extension

from molmo2.parallel.agree import write_line


def join_on_cpu() -> None:
    """Join the process group of the launcher over gloo; collective.

    The operator is compiled once for an environment, which takes more than a minute: rank 0 announces it. One rank
    alone has nobody to exchange with, so nothing is compiled for it.
    """
    name = ShareMemCommBuilder.NAME
    if int(os.environ["WORLD_SIZE"]) == 1:
        deepspeed.ops.__compatible_ops__[name] = False
    elif os.environ["RANK"] == "0" and not is_compiled(name):
        write_line(
            "DeepSpeed compiles its collectives for CPUs, once for this environment; that takes one to two minutes ...",
            sys.stderr,
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that the operator was built
        deepspeed.init_distributed(verbose=False)
    _free_name_of_shared_memory()


def is_compiled(name: str) -> bool:
    """Whether an operator of DeepSpeed lies compiled in the folder of torch's extensions."""
    return (Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so").exists()


def _free_name_of_shared_memory() -> None:
    """Unlink DeepSpeed's exchange buffer once all ranks have opened it: else 66 MiB a rank stay after a run."""
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
