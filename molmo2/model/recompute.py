"""Activation checkpointing: a layer's activations are recomputed in the backward pass instead of saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def recomputed(layer: Callable[..., Any], x: Tensor, *others: Any, offload: bool) -> Any:
    """Compute `layer(x, *others)` and save only its inputs for the backward pass; with `offload`, x in CPU memory.

    With `offload` gradients flow to `x` and to parameters, not to `others`. No layer may draw random numbers from a
    generator: its state is not kept for the recomputation.
    """
    if not offload:
        return checkpoint(layer, x, *others, use_reentrant=False, preserve_rng_state=False)
    if not x.requires_grad:  # everything before the layer is frozen; reentrant checkpointing would give no gradient
        x = x.detach().requires_grad_()
    with save_on_cpu(pin_memory=x.is_cuda):
        # Only reentrant checkpointing saves its input with saved-tensor hooks, which do the offloading.
        return checkpoint(layer, x, *others, use_reentrant=True, preserve_rng_state=False)
