"""Activations that a micro-batch keeps for its backward pass, measured on one layer of each kind and multiplied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from molmo2.model.connector import Connector
from molmo2.model.decoder import Decoder
from molmo2.model.loss import CHUNK_BYTES
from molmo2.model.mask import AttentionMask
from molmo2.model.presets import ModelConfig
from molmo2.model.vit import VisionTransformer

LAYER_PEAK = 1.3  # peak memory of one layer in backward, relative to its saved activations: gradients come on top


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one GPU computes at once; `recompute`, `chunk_crops` and `offload` as in `Molmo2.set_recompute`.

    `sp`: ranks that share the pack, of whose tokens these are a part. `item_size`: bytes of an activation. `compiled`
    and `budget`: whether parts of layers are compiled, and the part of their activations that they may keep.
    """

    tokens: float
    crops: int
    recompute: str
    chunk_crops: int | None = None
    sp: int = 1
    item_size: int = 2
    vit_frozen: bool = False
    offload: bool = False
    compiled: bool = False
    budget: float = 1.0


@dataclass(frozen=True, slots=True)
class SavedBytes:
    """Bytes of activations that autograd saves for backward, by what is recomputed.

    Attributes:
        layer: one language model layer of which nothing is recomputed, bytes per token.
        layer_light: one at `recompute: light`, bytes per token: its input, and inputs and result of attention.
        layer_input: the input of such a layer, bytes per token.
        norm: the norm after the last layer, bytes per token.
        block: one vision transformer block, bytes per crop.
        block_input: the input of such a block, bytes per crop.
        connector: the connector, bytes per frame.
    """

    layer: int
    layer_light: int
    layer_input: int
    norm: int
    block: int
    block_input: int
    connector: int


def saved_bytes(modules: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves for the backward pass of `run`, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in modules.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(sizes.values())


@functools.cache
def measure_saved(config: ModelConfig, dtype: torch.dtype) -> SavedBytes:
    """Measure the saved activations of this model on one layer of each kind and a few tokens."""
    tokens = 64
    with torch.device("meta"):
        decoder = Decoder(config.text)
        vit = VisionTransformer(config.vit, config.patch_size, config.patches_per_crop)
        connector = Connector(config.connector, config.vit, config.text)
    parts = (decoder.layers[0], decoder.norm, vit.blocks[0])
    layer, norm, block = (part.to_empty(device="cpu").to(dtype) for part in parts)
    connector.to_empty(device="cpu").to(dtype)

    x = torch.zeros(1, tokens, config.text.hidden_size, dtype=dtype, requires_grad=True)
    rope = decoder.rope(torch.arange(tokens)[None])[False]
    mask = AttentionMask(torch.zeros(1, tokens, dtype=torch.int32), torch.zeros(1, tokens, dtype=torch.bool))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    crop = torch.zeros(1, config.patches_per_crop, config.vit.hidden_size, dtype=dtype, requires_grad=True)
    side = round(config.patches_per_crop**0.5)
    window = config.video_pool**2
    pooling = torch.arange((side // config.video_pool) ** 2 * window).view(-1, window)
    features = torch.zeros(
        1,
        config.patches_per_crop,
        config.vit.hidden_size * len(config.vit.feature_layers),
        dtype=dtype,
        requires_grad=True,
    )
    per_token = {}
    for level in ("none", "light"):
        decoder.recompute = level
        per_token[level] = saved_bytes(layer, lambda: decoder.run_layer(layer, x, rope, mask, attend)) // tokens
    return SavedBytes(
        layer=per_token["none"],
        layer_light=per_token["light"],
        layer_input=x.nbytes // tokens,
        norm=saved_bytes(norm, lambda: norm(x)) // tokens,
        block=saved_bytes(block, lambda: block(crop)),
        block_input=crop.nbytes,
        connector=saved_bytes(connector, lambda: connector(features, pooling)) + features.nbytes,
    )


def kept_bytes(config: ModelConfig, kept: SavedBytes, batch: MicroBatch) -> dict[str, float]:
    """Bytes of activations that one GPU keeps from the forward pass of a micro-batch to its backward pass."""
    text, layers = config.text, config.text.num_layers
    # The result of attention is kept before and after its exchange.
    exchanged = text.num_heads * text.head_dim * batch.item_size if batch.sp > 1 else 0
    layer = {
        "none": batch.budget * kept.layer + (1 - batch.budget) * kept.layer_light,
        "light": kept.layer_light + exchanged,
        "full": kept.layer_input,
    }[batch.recompute]
    block = 0.0 if batch.vit_frozen else kept.block_input
    if batch.recompute == "none" and not batch.vit_frozen:
        block = batch.budget * kept.block + (1 - batch.budget) * kept.block_input
    on_gpu = 0 if batch.offload else 1
    return {
        "language model": batch.tokens * (on_gpu * layer * layers + kept.norm),
        "vision": on_gpu * batch.crops * block * config.vit.num_layers,
        "connector": batch.crops * kept.connector,
    }


def activation_bytes(config: ModelConfig, kept: SavedBytes, batch: MicroBatch) -> dict[str, float]:
    """Bytes of activations on one GPU in a micro-batch, with what backward makes again of one layer."""
    at_once = min(batch.crops, batch.chunk_crops or batch.crops)
    parts = kept_bytes(config, kept, batch)
    if batch.recompute != "none" or batch.budget < 1:
        parts["language model"] += batch.tokens * LAYER_PEAK * kept.layer
        parts["vision"] += at_once * LAYER_PEAK * kept.block
    if batch.vit_frozen:  # one block at a time
        parts["vision"] = at_once * kept.block
    heads = config.text.num_heads + 2 * config.text.num_kv_heads
    exchanged = 2 * batch.tokens * heads * config.text.head_dim * batch.item_size
    return parts | {"logits": CHUNK_BYTES[batch.compiled], "exchange": exchanged if batch.sp > 1 else 0}
