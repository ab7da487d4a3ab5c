"""AdamW over three components, each with its own learning rate, warm-up and gradient clip.

DeepSpeed clips only the norm over all parameters and has one schedule; Molmo2 trains vision tower, connector and
language model at different rates and clips each to its own norm. Clipping and schedules are therefore in the optimizer
that DeepSpeed wraps, and DeepSpeed's own are off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from molmo2.config import COMPONENTS, Optim, OptimGroup


class ComponentAdamW(torch.optim.AdamW):
    """AdamW that clips each parameter group to the group's own `max_norm`.

    Args:
        groups: dicts with "params", "name" and "max_norm".
        partitioned: whether each rank holds only a part of every gradient (ZeRO 1-3), so that squares are summed over
            the ranks. ZeRO 1 and 2 show one flat partition per group; ZeRO 3 calls `step` once per group, the
            other groups being empty, which is why empty groups are skipped.
        options: betas, eps, weight_decay and fused.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, partitioned: bool, **options: Any) -> None:
        super().__init__(groups, **options)
        self.partitioned = partitioned
        self.norms: dict[str, Tensor] = {}  # gradient norm of each component before clipping, fp32, last step
        self.skip = False  # whether the update is skipped: weights and moments do not change
        self.refused = False  # whether a component of the update had a gradient that is not finite; see `step`

    def begin(self, skip: bool = False) -> None:
        """Begin an update: one call of `step` or, under ZeRO-3, one for each component. `skip`: it changes nothing."""
        self.skip, self.refused = skip, False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip each component, then update, unless a gradient is not finite. All ranks must call it together.

        ZeRO-3 calls it for one component at a time: components before the faulty one are still updated, those after it
        are not.
        """
        scales = {}
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            square = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in gradients]).sum()
            if self.partitioned and dist.is_initialized():
                square = square.to(get_accelerator().current_device_name())  # offloaded gradients are on the CPU
                dist.all_reduce(square)
                square = square.to(gradients[0].device)
            norm = square.sqrt()
            self.norms[group["name"]] = norm
            scales[group["name"]] = (gradients, torch.clamp(group["max_norm"] / (norm + 1e-6), max=1.0))
        self.refused = self.refused or not all(bool(self.norms[name].isfinite()) for name in scales)
        if self.skip or self.refused:
            return None
        for gradients, scale in scales.values():
            torch._foreach_mul_(gradients, scale)
        if self.defaults["fused"]:
            for parameter, state in self.state.items():
                state["step"] = state["step"].to(parameter.device)  # a checkpoint may have left the number on the CPU
        return super().step(closure)


def parameter_groups(components: Mapping[str, Iterable[torch.nn.Parameter]], optim: Optim) -> list[dict[str, Any]]:
    """Groups for `ComponentAdamW`: one group of trainable parameters for each component.

    The rate is 0 until `set_learning_rates`. A component whose parameters are all frozen has no group.
    """
    groups = []
    for name in COMPONENTS:
        parameters = [p for p in components[name] if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "name": name, "lr": 0.0, "max_norm": getattr(optim, name).clip})
    return groups


def learning_rate(group: OptimGroup, step: int, num_steps: int, final_fraction: float) -> float:
    """Rate of the `step`-th update (from 1): linear from 0 to `lr`, then a cosine to `final_fraction` of it."""
    warmup = group.warmup(num_steps)
    if step < warmup:
        return group.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return group.lr * (final_fraction + (1 - final_fraction) * cosine)


def set_learning_rates(optimizer: Any, names: list[str], optim: Optim, step: int, num_steps: int) -> dict[str, float]:
    """Set the rate of every group for the `step`-th update (from 1) and return the rates by name.

    Groups are matched by index and not by their own names, since loading a checkpoint may replace names and rates.
    """
    rates = {name: learning_rate(getattr(optim, name), step, num_steps, optim.final_lr_fraction) for name in names}
    for group, name in zip(optimizer.param_groups, names, strict=True):
        group["lr"] = rates[name]
        group["name"] = name
        group["max_norm"] = getattr(optim, name).clip
    return rates
