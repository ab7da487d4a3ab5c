"""Agreement of ranks between steps: report a failure once, run an action on one rank, print on rank 0, sum numbers.

Inside a step a rank reports its own failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

P = ParamSpec("P")
T = TypeVar("T")
Sums = TypeVar("Sums", bound=tuple[Tensor, ...])


class AgreedError(Exception):
    """A block of `all_ranks_ok` failed on some rank; all ranks raise this, and rank 0 has printed the reason."""


@contextmanager
def all_ranks_ok() -> Iterator[None]:
    """Run the block on every rank; if it fails on any, rank 0 prints one reason and no rank goes on. Collective.

    Raises:
        AgreedError: on every rank, if the block raised a ValueError or an OSError on any.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = str(error) or type(error).__name__
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        if dist.get_rank() == 0:
            write_line(f"train.py: {next(text for text in failures if text)}", sys.stderr)
        raise AgreedError


def on_rank_zero(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on rank 0 and return its result on all ranks; collective.

    Raises:
        AgreedError: on every rank, if the call raised a ValueError or an OSError.
    """
    result: list[Any] = [None]
    with all_ranks_ok():
        if dist.get_rank() == 0:
            result[0] = function(*args, **kwargs)
    dist.broadcast_object_list(result)
    return cast(T, result[0])


def leave(code: int) -> NoReturn:
    """End the process with this exit code at once, in whatever state the other ranks are.

    Destroying a process group after other ranks have exited can hang (NCCL) or abort the process (gloo's threads),
    which would hide the exit code. Files are already closed here; only the standard streams must be flushed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has exited; that rank has reported its own reason."""
    return isinstance(error, dist.DistError) or "closed by peer" in str(error) or "reset by peer" in str(error)


def say(text: str) -> None:
    """Print a line on rank 0's standard output."""
    if dist.get_rank() == 0:
        write_line(text)


def write_line(text: str, stream: Any = None) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(text, file=stream)
    (stream or sys.stdout).flush()


def sum_over_ranks(sums: Sums) -> Sums:
    """Sum every field over all ranks; collective.

    Args:
        sums: a NamedTuple of tensors on one device, with the same shapes on every rank.

    Returns:
        The same type with float64 tensors on the CPU, so that reading a field does not wait for the device again.
    """
    flat = torch.cat([value.double().flatten() for value in sums])
    dist.all_reduce(flat)
    parts = flat.cpu().split([value.numel() for value in sums])
    return type(sums)(*(part.view(value.shape) for part, value in zip(parts, sums, strict=True)))
