"""Read the `config.json` of other models: released and native Molmo2, and the base models Qwen3, Olmo-3 and SigLIP.

It includes the inverse of `names.hub_config`. A setting that this model does not support is an error with the key's
place in the file; it is never ignored. Only sizes and constants are read here; tensors are not opened.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2.model.presets import (
    PRESETS,
    ConnectorConfig,
    ModelConfig,
    RopeScaling,
    TextConfig,
    VitConfig,
    config_differences,
)
from molmo2.weights.config_types import CONFIG, ForeignConfigError, checks_types
from shards.layout import VisualTokens

_TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "qkv_bias": False, "use_qk_norm": True}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True}
_ADAPTER_FIXED = {"hidden_act": "silu", "attention_bias": True, "mlp_bias": False, "pooling_attention_mask": True}
# Names of the visual tokens: ours, and those in `config.json`.
_TOKEN_KEYS = {
    "im_start": "image_start_token_id",
    "im_end": "image_end_token_id",
    "im_patch": "image_patch_id",
    "im_col": "image_col_id",
    "low_res_im_start": "low_res_image_start_token_id",
    "im_low": "image_low_res_id",
    "frame_start": "frame_start_token_id",
    "frame_end": "frame_end_token_id",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """An object in a `config.json`, with its place for error messages."""

    value: Mapping[str, Any]
    where: str

    def get(self, *names: str) -> Any:
        """The value under the first of these names that the object has."""
        for name in names:
            if name in self.value:
                return self.value[name]
        raise ForeignConfigError(f"{self.where}: {' or '.join(names)} is missing")

    def section(self, *names: str) -> Section:
        """The object under the first of these names that this object has."""
        value = self.get(*names)
        if not isinstance(value, dict):
            raise ForeignConfigError(f"{self.where}: {names[0]} is {value!r}; it must be an object")
        return Section(value, f"{self.where}: {next(name for name in names if name in self.value)}")

    def expect(self, fixed: Mapping[str, Any]) -> None:
        """Raise an error if any of these keys has another value; absent keys are accepted."""
        other = [
            f"{key} is {self.value[key]!r}, supported is {fixed[key]!r}"
            for key in fixed
            if self.value.get(key, fixed[key]) != fixed[key]
        ]
        if other:
            raise ForeignConfigError(f"{self.where}: settings that this code does not support: {', '.join(other)}")


def open_config(directory: Path) -> Section:
    """Read the `config.json` of a directory.

    Raises:
        ForeignConfigError: the file is missing or is not a JSON object.
    """
    path = directory / CONFIG
    value = _read_json(path)
    if value is None:
        raise ForeignConfigError(f"{path}: no such file; give the directory of a downloaded or exported model")
    return Section(value, str(path))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ForeignConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ForeignConfigError(f"{path}: is not a JSON object")
    return value


# --- Molmo2 ----------------------------------------------------------------------------------------------------------


@checks_types
def read_molmo2(directory: Path) -> ModelConfig:
    """Read the configuration of a Molmo2 directory in the released ("hub") or native form.

    Its name is that of the preset with equal settings, else "molmo2". The geometry of crops that is not in
    `config.json` comes from the processor's files; without them it is Molmo2's.

    Raises:
        ForeignConfigError: another kind of model, or settings that this code does not support.
    """
    top = open_config(directory)
    top.expect({"use_frame_special_tokens": True, "tie_word_embeddings": False})
    if top.get("model_type") != "molmo2":
        raise ForeignConfigError(f"{top.where}: model_type {top.get('model_type')!r}, wanted 'molmo2'")
    text, adapter = top.section("text_config"), top.section("adapter_config")
    vision = top.section("vit_config", "vision_config")
    layers = adapter.get("vision_feature_layer", "vit_layers")
    num_layers = vision.get("num_hidden_layers")
    features = tuple(layer % num_layers for layer in layers)  # released models count layers from the end
    adapter.expect(_ADAPTER_FIXED | {"text_hidden_size": text.get("hidden_size")})
    vit = _vision(vision, features)
    connector = ConnectorConfig(
        hidden_size=adapter.get("hidden_size"),
        num_heads=_heads(adapter),
        intermediate_size=adapter.get("intermediate_size"),
    )
    config = ModelConfig(
        name="molmo2",
        vit=vit,
        connector=connector,
        text=_molmo2_text(text),
        crop_size=_square(vision, "image_size", "image_default_input_size"),
        patch_size=vision.get("patch_size", "image_patch_size"),
        **_pooling(directory),
    )
    tokens = VisualTokens.after(config.text.vocab_size)
    top.expect({key: getattr(tokens, name) for name, key in _TOKEN_KEYS.items()})
    return next((preset for preset in PRESETS.values() if not config_differences(config, preset)), config)


def _molmo2_text(text: Section) -> TextConfig:
    return dataclasses.replace(
        _text(text, text.value.get("rope_scaling_layers")),
        additional_vocab_size=text.get("additional_vocab_size"),
        max_positions=text.get("max_position_embeddings"),
        qk_norm=text.get("qk_norm_type"),
        norm_after=text.get("norm_after"),
    )


def _vision(vision: Section, features: tuple[int, ...]) -> VitConfig:
    """The vision transformer without the blocks after the last of `features`, as in the released models."""
    vision.expect(_VISION_FIXED)
    return VitConfig(
        hidden_size=vision.get("hidden_size"),
        intermediate_size=vision.get("intermediate_size"),
        num_layers=max(features) + 1,
        num_heads=_heads(vision),
        feature_layers=features,
        norm_eps=vision.get("layer_norm_eps"),
    )


def _heads(section: Section) -> int:
    """The number of attention heads; grouped heads, and heads that do not fill the width, are refused."""
    heads, width = section.get("num_attention_heads"), section.get("hidden_size")
    section.expect({"num_key_value_heads": heads, "head_dim": width // heads})
    return int(heads)


def _square(section: Section, *names: str) -> int:
    """The side of a square that is given as one number or as two equal ones."""
    size = section.get(*names)
    sides = size if isinstance(size, list) else [size, size]
    if len(set(sides)) != 1:
        raise ForeignConfigError(f"{section.where}: {names[0]} {size} is not a square")
    return int(sides[0])


def _pooling(directory: Path) -> dict[str, int]:
    """Overlap and pooling windows from the processor's files: one file (native form) or two (released form)."""
    settings: dict[str, int] = {}
    joint = _read_json(directory / "processor_config.json") or {}
    for nested, file, keys in (
        (
            "image_processor",
            "preprocessor_config.json",
            {"overlap_margins": "overlap_margin", "pooling_size": "image_pool"},
        ),
        ("video_processor", "video_preprocessor_config.json", {"pooling_size": "video_pool"}),
    ):
        value = joint.get(nested) or _read_json(directory / file) or {}
        section = Section(value, f"{directory}: {nested}")
        settings |= {ours: _square(section, theirs) for theirs, ours in keys.items() if theirs in value}
    return settings


# --- base models -----------------------------------------------------------------------------------------------------


@checks_types
def read_base_text(directory: Path) -> tuple[TextConfig, bool]:
    """Read the language model of a Qwen3 or Olmo-3 directory, and whether its head is tied to the embedding.

    Raises:
        ForeignConfigError: another kind of model, or settings that this code does not support.
    """
    top = open_config(directory)
    kind = top.get("model_type")
    if kind not in ("qwen3", "olmo3"):
        raise ForeignConfigError(f"{top.where}: model_type {kind!r}; Molmo2's language model is qwen3 or olmo3")
    top.expect({"use_sliding_window": False})
    olmo = kind == "olmo3"
    # Olmo-3 scales RoPE only in its full-attention layers. Its other layers have a sliding window; Molmo2 has none.
    layers = [n for n, layer in enumerate(top.get("layer_types")) if layer == "full_attention"] if olmo else None
    text = dataclasses.replace(_text(top, layers), qk_norm="olmo" if olmo else "qwen3", norm_after=olmo)
    return text, bool(top.value.get("tie_word_embeddings", False))


@checks_types
def read_siglip(directory: Path, features: tuple[int, ...]) -> tuple[VitConfig, int, int, int]:
    """Read the vision transformer of a SigLIP or SigLIP2 directory, up to the last block of `features`.

    Returns:
        Its configuration, the side of its images and of a patch (pixels), and the number of blocks in the file.

    Raises:
        ForeignConfigError: another kind of model, or fewer blocks than `features` needs.
    """
    top = open_config(directory)
    kind = top.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise ForeignConfigError(
            f"{top.where}: model_type {kind!r}; Molmo2's vision tower is a SigLIP2 of fixed size (model_type siglip), "
            "such as google/siglip2-so400m-patch14-384"
        )
    vision = top.section("vision_config") if kind == "siglip" else top
    defaults = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}  # released files leave them out
    vision = Section(defaults | dict(vision.value), vision.where)
    blocks = vision.get("num_hidden_layers")
    if max(features) >= blocks:
        raise ForeignConfigError(f"{vision.where}: {blocks} blocks, but the model needs block {max(features)}")
    return _vision(vision, features), _square(vision, "image_size"), vision.get("patch_size"), blocks


def _text(text: Section, scaled_layers: Sequence[int] | None) -> TextConfig:
    """The settings of every kind of decoder. `scaled_layers`: the layers to which RoPE scaling applies; None: all."""
    text.expect(_TEXT_FIXED)
    layers = tuple(range(text.get("num_hidden_layers"))) if scaled_layers is None else tuple(scaled_layers)
    theta, scaling = _rope(text, layers)
    return TextConfig(
        hidden_size=text.get("hidden_size"),
        intermediate_size=text.get("intermediate_size"),
        num_layers=text.get("num_hidden_layers"),
        num_heads=text.get("num_attention_heads"),
        num_kv_heads=text.get("num_key_value_heads"),
        head_dim=text.value.get("head_dim") or text.get("hidden_size") // text.get("num_attention_heads"),
        vocab_size=text.get("vocab_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=text.get("rms_norm_eps", "layer_norm_eps"),
    )


def _rope(text: Section, layers: tuple[int, ...]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`."""
    value: Any = text.value.get("rope_parameters")
    if value is None:
        value = {"rope_theta": text.get("rope_theta"), **(text.value.get("rope_scaling") or {})}
    rope = Section(value.get("full_attention", value), f"{text.where}: rope")
    theta = float(rope.get("rope_theta"))
    plain = value.get("sliding_attention", {"rope_theta": theta})
    if plain["rope_theta"] != theta or plain.get("rope_type", "default") != "default":
        raise ForeignConfigError(
            f"{rope.where}: {plain} on sliding-window layers; supported is {theta} without scaling"
        )
    kind = rope.value.get("rope_type", rope.value.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ForeignConfigError(f"{rope.where}: rope_type {kind!r}; known: default, yarn")
    factor = float(rope.get("factor"))
    return theta, RopeScaling(
        factor=factor,
        attention_factor=rope.value.get("attention_factor") or 0.1 * math.log(factor) + 1,  # YaRN's default
        original_max_positions=rope.get("original_max_position_embeddings"),
        beta_fast=rope.value.get("beta_fast") or 32.0,
        beta_slow=rope.value.get("beta_slow") or 1.0,
        layers=layers,
    )


# --- comparing -------------------------------------------------------------------------------------------------------
