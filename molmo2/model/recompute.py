"""Layers whose activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def recomputed(layer: Callable[..., Tensor], x: Tensor, *others: Any, offload: bool) -> Tensor:
    """`layer(x, *others)`, of which only `x` is kept for the backward pass; with `offload` in the CPU's memory.

    Gradients flow to `x` and to parameters, not to `others`.
    """
    if not offload:
        return checkpoint(layer, x, *others, use_reentrant=False)
    if not x.requires_grad:  # with everything before it frozen; this kind of checkpoint would give no gradient at all
        x = x.detach().requires_grad_()
    with save_on_cpu(pin_memory=x.is_cuda):
        # Only the reentrant kind keeps its input where these hooks see it.
        return checkpoint(layer, x, *others, use_reentrant=True)
