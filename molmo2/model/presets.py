"""The configuration of a Molmo2 model, and the presets. This file imports no torch and reads no files.

The real presets have the sizes of the released Molmo2 models; `tiny` is for the demo and the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QK_NORMS = ("qwen3", "olmo")
PRECISION_NAMES = ("bf16", "fp32")  # precisions in which a model answers


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise ValueError(f"{name} {value} is not a multiple of {of} {unit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN, applied on `layers` only (Olmo-3: the full-attention layers); the other layers use plain RoPE."""

    factor: float
    attention_factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """Vision transformer: pre-norm, biases, learned positions, no CLS token. `num_layers`: layers that are used."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    feature_layers: tuple[int, ...]  # outputs of these blocks (0-based) are concatenated in this order
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_multiple("vit.hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if not self.feature_layers or not all(0 <= layer < self.num_layers for layer in self.feature_layers):
            raise ValueError(
                f"vit.feature_layers {self.feature_layers}: name some of the layers 0-{self.num_layers - 1}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorConfig:
    """Attention pooling over windows of patches, then a SwiGLU projector."""

    hidden_size: int
    num_heads: int
    intermediate_size: int

    def __post_init__(self) -> None:
        _check_multiple("connector.hidden_size", self.hidden_size, "num_heads", self.num_heads)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Decoder: RoPE, RMSNorm, grouped queries, normalised queries and keys, SwiGLU."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # base vocabulary: rows of the base table and of the head
    additional_vocab_size: int = 128  # rows for visual tokens; they are never predicted
    rope_theta: float = 1e6
    max_positions: int = 36_864
    norm_eps: float = 1e-6
    qk_norm: str = "qwen3"  # one of QK_NORMS; "qwen3": per head; "olmo": over the full projection
    norm_after: bool = False  # norms on the outputs of the sublayers instead of their inputs
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_multiple("text.num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"text.qk_norm {self.qk_norm!r}: Molmo2 has {' and '.join(QK_NORMS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Configuration of a model and the geometry of its vision input (sizes in pixels, margins in patches)."""

    name: str
    vit: VitConfig
    connector: ConnectorConfig
    text: TextConfig
    crop_size: int = 378
    patch_size: int = 14
    overlap_margin: int = 4
    image_pool: int = 2
    video_pool: int = 3

    def __post_init__(self) -> None:
        _check_multiple("crop_size", self.crop_size, "patch_size", self.patch_size)

    @property
    def patches_per_crop(self) -> int:
        """Patches of one crop."""
        return (self.crop_size // self.patch_size) ** 2

    @property
    def image_patch_id(self) -> int:
        """Id of the token that carries a visual feature: the third added token."""
        return self.text.vocab_size + 2

    def to_json(self) -> dict[str, Any]:
        """The config as a JSON value; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`."""
        text = dict(value["text"])
        if text["rope_scaling"] is not None:
            scaling = dict(text["rope_scaling"])
            text["rope_scaling"] = RopeScaling(**{**scaling, "layers": tuple(scaling["layers"])})
        vit = {**value["vit"], "feature_layers": tuple(value["vit"]["feature_layers"])}
        parts = {
            "vit": VitConfig(**vit),
            "connector": ConnectorConfig(**value["connector"]),
            "text": TextConfig(**text),
        }
        return cls(**{**value, **parts})


# SigLIP2 So400m/14 384: the outputs of its last two blocks of 27 are not used, so they are left out.
_SIGLIP2 = VitConfig(hidden_size=1152, intermediate_size=4304, num_layers=25, num_heads=16, feature_layers=(24, 18))


def _real(name: str, text: TextConfig) -> ModelConfig:
    connector = ConnectorConfig(hidden_size=1152, num_heads=16, intermediate_size=text.intermediate_size)
    return ModelConfig(name=name, vit=_SIGLIP2, connector=connector, text=text)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, theta: float) -> TextConfig:
    return TextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=151_936,
        rope_theta=theta,
    )


_OLMO3 = TextConfig(
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=100_278,
    rope_theta=5e5,
    max_positions=65_536,
    qk_norm="olmo",
    norm_after=True,
    rope_scaling=RopeScaling(
        factor=8.0,
        attention_factor=1.2079441541679836,
        original_max_positions=8192,
        layers=tuple(range(3, 32, 4)),
    ),
)

_TINY = ModelConfig(
    name="tiny",
    vit=VitConfig(hidden_size=128, intermediate_size=128, num_layers=2, num_heads=4, feature_layers=(1, 0)),
    connector=ConnectorConfig(hidden_size=128, num_heads=4, intermediate_size=512),
    text=TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=512,
        additional_vocab_size=16,
        rope_theta=1e4,
        max_positions=8192,
    ),
    crop_size=48,
    patch_size=8,
    overlap_margin=1,
)

PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        _TINY,
        _real("nano", _qwen3(1024, 3072, 28, 16, 1e6)),
        _real("4b", _qwen3(2560, 9728, 36, 32, 5e6)),
        _real("8b", _qwen3(4096, 12_288, 36, 32, 1e6)),
        _real("o-7b", _OLMO3),
    )
}


def config_differences(found: Any, wanted: Any, ignore: Sequence[str] = ()) -> list[str]:
    """Fields in which two configs differ, as "text.rope_theta 1e6, wanted 5e6"; the configs' names are not compared.

    Args:
        found: a dataclass.
        wanted: another dataclass of the same type.
        ignore: dotted names of fields that may differ.
    """
    old, new = (_flat(dataclasses.asdict(config)) for config in (found, wanted))
    names = [name for name in {**old, **new} if name not in ("name", *ignore)]
    return [f"{name} {old.get(name)}, wanted {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat
