"""Molmo2's configuration by the key names of the released checkpoints, as vLLM's model reads it.

It is copied into an export for vLLM: the versions of transformers that vLLM allows have no Molmo2. It holds values as
`config.json` has them and computes nothing, except for the rotary frequencies, whose keys vLLM expects in one mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


class Molmo2VitConfig(PretrainedConfig):
    """The vision transformer."""

    model_type = "molmo2_vit"
    base_config_key = "vit_config"


class Molmo2AdapterConfig(PretrainedConfig):
    """The connector: pooling of patches and the projection to the language model."""

    model_type = "molmo2_adapter"
    base_config_key = "adapter_config"


class Molmo2TextConfig(PretrainedConfig):
    """The language model; it has defaults because transformers makes an empty one to print another."""

    model_type = "molmo2_text"
    base_config_key = "text_config"

    def __init__(
        self,
        max_position_embeddings: int = 36864,
        rope_theta: float = 1e6,
        rope_scaling: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        # These are set before `super` is called, which completes `rope_parameters` by them.
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})}
        super().__init__(**settings)


class Molmo2Config(PretrainedConfig):
    """The whole model; `model_type` inside a part of `config.json` is ignored."""

    model_type = "molmo2"
    sub_configs = {  # noqa: RUF012 (the name and the kind of value are transformers')
        "vit_config": Molmo2VitConfig,
        "adapter_config": Molmo2AdapterConfig,
        "text_config": Molmo2TextConfig,
    }

    def __init__(self, vit_config: Any = None, adapter_config: Any = None, text_config: Any = None, **settings: Any):
        parts = {"vit_config": vit_config, "adapter_config": adapter_config, "text_config": text_config}
        for name, part in parts.items():
            kind = self.sub_configs[name]
            if not isinstance(part, kind):
                part = kind(**{key: value for key, value in (part or {}).items() if key != "model_type"})
            setattr(self, name, part)
        super().__init__(**settings)
