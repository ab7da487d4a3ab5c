"""Linear layers of the language model in 8-bit floating point, by torchao's rowwise scaling.

Weights stay what they are, in bfloat16 with float32 masters; inputs, weights and gradients are rounded to 8 bits for
each product, every row with its own scale. Keys and values, the head, the vision transformer and the connector stay in
bfloat16: they are a small part of the operations, and the head's products decide the loss.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import nn

from molmo2.model.molmo2 import Molmo2

LAYERS = re.compile(r"layers\.\d+\.(attention\.q_proj|attention\.o_proj|gate_proj|up_proj|down_proj)")


def use_fp8(model: Molmo2, device: torch.device) -> None:
    """Let the linear layers of `LAYERS` compute in 8 bits, in place; parameters and their names stay as they are.

    On a CPU, which has no such products, the rounding is emulated.

    Raises:
        ImportError: torchao is missing.
        ValueError: the GPU has no such products.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(f"train.fp8 needs torchao: pip install -e '.[fp8]' ({error})") from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ValueError(f"train.fp8 needs an H100 or a newer GPU, not {torch.cuda.get_device_name(device)}")
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name("rowwise"), emulate=device.type == "cpu", pad_inner_dim=True
    )

    def is_chosen(_: nn.Module, name: str) -> bool:
        return LAYERS.fullmatch(name) is not None

    convert_to_float8_training(model.text, module_filter_fn=is_chosen, config=config)
