"""Small Molmo2 models of transformers and ours with equal, noisy weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import Molmo2Config, Molmo2ForConditionalGeneration

from molmo2.model.generate import PromptTensors
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ConnectorConfig, ModelConfig, RopeScaling, TextConfig, VitConfig
from molmo2.weights.names import from_foreign

QWEN = ModelConfig(
    name="parity",
    vit=VitConfig(hidden_size=32, intermediate_size=48, num_layers=4, num_heads=2, feature_layers=(3, 1)),
    connector=ConnectorConfig(hidden_size=32, num_heads=2, intermediate_size=40),
    text=TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=320,
        additional_vocab_size=16,
        max_positions=4096,
    ),
    crop_size=84,
    patch_size=14,
    overlap_margin=1,
)
OLMO = dataclasses.replace(QWEN, text=dataclasses.replace(QWEN.text, qk_norm="olmo", norm_after=True, num_kv_heads=4))
YARN = dataclasses.replace(
    OLMO,
    text=dataclasses.replace(
        OLMO.text,
        rope_theta=5e5,
        rope_scaling=RopeScaling(
            factor=8.0, attention_factor=1.2079441541679836, original_max_positions=64, layers=(1,)
        ),
    ),
)
CONFIGS = {"qwen3": QWEN, "olmo": OLMO, "yarn": YARN}


def noisy_model(config: ModelConfig = QWEN, seed: int = 0) -> Molmo2:
    """Random weights, norms and biases included, large enough for lively answers."""
    torch.manual_seed(seed)
    model = Molmo2(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def reference_config(config: ModelConfig) -> Molmo2Config:
    """The same model in transformers' terms."""
    vit, text, base = config.vit, config.text, config.text.vocab_size
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    layers = None
    if text.rope_scaling:
        scaling = text.rope_scaling
        layers = list(scaling.layers)
        rope = {
            "rope_type": "yarn",
            "rope_theta": text.rope_theta,
            "factor": scaling.factor,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return Molmo2Config(
        vision_config={
            "hidden_size": vit.hidden_size,
            "intermediate_size": vit.intermediate_size,
            "num_hidden_layers": vit.num_layers,
            "num_attention_heads": vit.num_heads,
            "num_key_value_heads": vit.num_heads,
            "head_dim": vit.head_dim,
            "image_size": [config.crop_size] * 2,
            "patch_size": config.patch_size,
            "num_position_embeddings": config.patches_per_crop,
        },
        adapter_config={
            "vision_feature_layer": list(vit.feature_layers),
            "hidden_size": config.connector.hidden_size,
            "num_attention_heads": config.connector.num_heads,
            "num_key_value_heads": config.connector.num_heads,
            "head_dim": config.connector.head_dim,
            "intermediate_size": config.connector.intermediate_size,
            "text_hidden_size": text.hidden_size,
        },
        text_config={
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": base,
            "additional_vocab_size": text.additional_vocab_size,
            "max_position_embeddings": text.max_positions,
            "qk_norm_type": text.qk_norm,
            "norm_after": text.norm_after,
            "rope_parameters": rope,
            "rope_scaling_layers": layers,
        },
        image_start_token_id=base,
        image_end_token_id=base + 1,
        image_patch_id=base + 2,
        image_col_id=base + 3,
        low_res_image_start_token_id=base + 4,
        image_low_res_id=base + 6,
        frame_start_token_id=base + 7,
        frame_end_token_id=base + 8,
    )


def pair(config: ModelConfig, seed: int = 0) -> tuple[Molmo2ForConditionalGeneration, Molmo2]:
    """Transformers' model and ours with equal weights, noise on all of them, norms and biases included."""
    torch.manual_seed(seed)
    reference = Molmo2ForConditionalGeneration._from_config(reference_config(config), attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = Molmo2(config)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    weights = from_foreign(shapes, reference.state_dict())
    ours.load_state_dict({name: read() for name, read in weights.items()})
    return reference.eval(), ours.eval()


def speaker() -> Molmo2:
    """A model of ours whose answers to different questions differ."""
    made = Molmo2(QWEN).init_weights(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(30)
    return made.eval()


def prompts(*lengths: int) -> list[PromptTensors]:
    """Prompts of text alone, of these lengths."""
    size, width = QWEN.crop_size, QWEN.video_pool**2
    return [
        PromptTensors(
            input_ids=torch.arange(1, length + 1),
            is_visual=torch.zeros(length, dtype=torch.bool),
            pixels=torch.zeros(0, size, size, 3, dtype=torch.uint8),
            pooling=torch.zeros(0, width, dtype=torch.int64),
        )
        for length in lengths
    ]
