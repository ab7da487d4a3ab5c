"""LoRA on the language model (arXiv 2106.09685): low-rank adapters beside its linear layers, which stay as they are.

The adapters are peft's. Reading the weights of a checkpoint merges them; only a resumed run loads them separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molmo2.model.molmo2 import Molmo2

LAYERS = r"layers\.\d+\.(attention\.[qkvo]_proj|gate_proj|up_proj|down_proj)"
BASE, A, B = (f".{name}.weight" for name in ("base_layer", "lora_A.default", "lora_B.default"))


@torch.no_grad()
def add_adapters(model: Molmo2, rank: int, alpha: float, seed: int) -> None:
    """Add adapters with zero output to every linear layer of the decoder, and freeze the decoder's own weights.

    The added embeddings, the connector and the vision transformer train as before. The initial adapters are the same on
    every rank.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an optional dependency, which `train.py` has checked

    with torch.random.fork_rng():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=LAYERS)
        inject_adapter_in_model(config, model.text)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.text.named_parameters():
        if name.endswith(A):
            drawn = torch.empty(parameter.shape).normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            parameter.copy_(drawn)
    model.text.embedding.added.requires_grad_(True)
    model.lm_head.requires_grad_(False)


def without_adapters(weights: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The weights to which adapters are added, by their names without them; the adapters are left out."""
    return {name.replace(BASE, ".weight"): read for name, read in weights.items() if not name.endswith((A, B))}


def merged(weights: Mapping[str, Callable[[], Tensor]], recipe: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Merge adapters into the weights as they are read.

    Args:
        weights: for each name a function that reads the tensor.
        recipe: the JSON of the recipe that trained them, with or without LoRA.
    """
    settings = recipe["optim"].get("lora")
    if settings is None:
        return dict(weights)
    scale, plain = settings["alpha"] / settings["rank"], without_adapters(weights)
    for name, read in weights.items():
        stem = name.removesuffix(BASE)
        if stem != name:
            plain[f"{stem}.weight"] = partial(_merge, read, weights[stem + A], weights[stem + B], scale)
    return plain


def _merge(base: Callable[[], Tensor], a: Callable[[], Tensor], b: Callable[[], Tensor], scale: float) -> Tensor:
    return base() + scale * (b() @ a())
