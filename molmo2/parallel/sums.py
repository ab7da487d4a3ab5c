"""Named sums over all ranks, with one collective for all fields."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Sums = TypeVar("Sums", bound=tuple[Tensor, ...])


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
