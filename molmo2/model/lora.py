"""LoRA on the language model (arXiv 2106.09685): low-rank adapters beside its linear layers, which stay as they are.

peft makes the adapters. Whoever reads a checkpoint gets them merged; only resuming sees them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molmo2.model.molmo2 import Molmo2

LAYERS = r"layers\.\d+\.(attention\.[qkvo]_proj|gate_proj|up_proj|down_proj)"
BASE, A, B = (f".{name}.weight" for name in ("base_layer", "lora_A.default", "lora_B.default"))


@torch.no_grad()
def add_adapters(model: Molmo2, rank: int, alpha: float, seed: int) -> None:
    """Put adapters that change nothing yet beside every linear layer of the decoder, and freeze all else of it.

    The added embeddings, the connector and the vision transformer train as before. Equal on every rank.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra; `train.py` has checked that it is there

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


def merged(weights: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a plain model; `recipe`: JSON of the one that trained them, perhaps without adapters."""
    settings = recipe["optim"].get("lora")
    if settings is None:
        return dict(weights)
    scale, plain = settings["alpha"] / settings["rank"], {}
    for name, tensor in weights.items():
        stem = name.removesuffix(BASE)
        if stem != name:
            plain[f"{stem}.weight"] = tensor + scale * (weights[stem + B] @ weights[stem + A])
        elif not name.endswith((A, B)):
            plain[name] = tensor
    return plain
