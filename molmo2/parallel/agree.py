"""What ranks do together before and between steps: agree that all went well, let one act for all, and speak once.

Steps themselves do not come here: a failure in the middle of one is told by the rank that had it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")


class AgreedError(Exception):
    """Something failed on some rank; all ranks know, and rank 0 has said so."""


def agreed(action: Callable[[], T]) -> T:
    """Do something on every rank; if it fails on any, say so once.

    Raises:
        AgreedError: on every rank, when it failed on one.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(action())
    except (ValueError, OSError) as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        if dist.get_rank() == 0:
            write(f"train.py: {next(text for text in failures if text)}", sys.stderr)
        raise AgreedError
    return results[0]


def on_rank_zero(action: Callable[[], T]) -> T:
    """The result of something that one rank does for all."""
    box: list[Any] = [agreed(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def leave(code: int) -> NoReturn:
    """End the process with this code, whatever state its peers are in.

    Taking a process group apart while peers are already gone can hang (NCCL) or abort the process (gloo's threads),
    which would hide the exit code. Files are closed by then; only the standard streams are left to flush.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended, which has told its own reason."""
    return isinstance(error, dist.DistError) or "closed by peer" in str(error) or "reset by peer" in str(error)


def say(text: str) -> None:
    """A line on rank 0's standard output."""
    if dist.get_rank() == 0:
        write(text)


def write(text: str, stream: Any = None) -> None:
    """A line that does not tear the progress bar."""
    tqdm.write(text, file=stream)
    (stream or sys.stdout).flush()
