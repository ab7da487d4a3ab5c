"""Floating-point operations of a forward pass for MFU, computed from sizes for each of the three components.

Only matrix products and attention count, with two operations for a multiply-add, as in `torch.utils.flop_counter`.
Attention counts the pairs that the mask allows, even if a kernel computes more. The backward pass takes twice as much
as the forward pass; MFU does not count recomputed activations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import torch

from molmo2.model.presets import ConnectorConfig, ModelConfig, TextConfig, VitConfig

# Dense bfloat16 peaks of GPUs in TFLOP/s, from NVIDIA's data sheets, by a part of the name that torch gives.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "B200": 2250, "L40S": 362, "RTX 4090": 165}
TRAINING_FACTOR = 3  # operations of forward and backward, relative to forward alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The sizes of a batch that determine the model's operations.

    Attributes:
        num_crops: ViT inputs.
        num_visual_tokens: rows of the pooling table.
        pool_width: patches in a row of the pooling table, padding included.
        num_tokens: tokens of the language model, padding included.
        num_pairs: (query, key) pairs of tokens that the mask allows, see `molmo2.model.pairs`.
        num_logits: tokens whose logits are computed.
    """

    num_crops: int
    num_visual_tokens: int
    pool_width: int
    num_tokens: int
    num_pairs: int
    num_logits: int


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of each component; the head is part of the language model."""

    vit: int
    connector: int
    llm: int

    @property
    def total(self) -> int:
        """Operations of the whole model."""
        return self.vit + self.connector + self.llm


def forward_flops(config: ModelConfig, work: Workload) -> Flops:
    """Operations of one forward pass over `work`."""
    features = config.vit.hidden_size * len(config.vit.feature_layers)
    connector = _connector_token(config.connector, features, work.pool_width, config.text.hidden_size)
    return Flops(
        vit=work.num_crops * _vit_crop(config.vit, config.patches_per_crop, config.patch_size),
        connector=work.num_visual_tokens * connector,
        llm=_llm(config.text, work),
    )


def training_flops(forward: Flops, frozen: Collection[str] = ()) -> Flops:
    """Operations of forward and backward; `frozen` names components.

    A frozen component has no gradients of its weights, and none of its inputs if nothing before it is trained. Two
    small parts are ignored: the first layer that is trained needs no gradients of its inputs, and the attention of a
    frozen component costs as much in backward as that of a trained one.
    """
    counts: dict[str, int] = {}
    trained_before = False
    for name, count in asdict(forward).items():  # in the order of the forward pass
        trained = name not in frozen
        counts[name] = count * (TRAINING_FACTOR if trained else 1 + trained_before)
        trained_before |= trained
    return Flops(**counts)


def step_flops(config: ModelConfig, work: Workload, frozen: Collection[str] = (), level: str = "none") -> int:
    """Operations of training with what is recomputed at a `level` of `Molmo2.set_recompute`, which MFU leaves out."""
    forward = forward_flops(config, work)
    total = training_flops(forward, frozen).total
    if level == "none":
        return total
    again = replace(work, num_pairs=0) if level == "light" else work  # "light" keeps the result of attention
    return total + forward_flops(config, again).llm + (forward.vit if "vit" not in frozen else 0)


def unit_costs(config: ModelConfig, frozen: Collection[str] = (), level: str = "none") -> tuple[int, int, int]:
    """Operations of training per token, per crop and per allowed pair; those of a pack are nearly their sum.

    Two assumptions make it a sum of what the index of a dataset knows: every crop has the visual tokens of a video
    frame, and every other token has a loss, as only prompts have none.
    """
    visual = (round(config.patches_per_crop**0.5) // config.video_pool) ** 2
    nothing = dict.fromkeys(Workload.__dataclass_fields__, 0)
    units: tuple[dict[str, int], ...] = (
        {"num_tokens": 1, "num_logits": 1},
        {"num_crops": 1, "num_visual_tokens": visual, "pool_width": config.video_pool**2, "num_logits": -visual},
        {"num_pairs": 1},
    )
    token, crop, pair = (step_flops(config, Workload(**nothing | unit), frozen, level) for unit in units)
    return token, crop, pair


def known_peak() -> float | None:
    """Dense bfloat16 peak of this machine's GPU in TFLOP/s; None without a GPU or for one not in `PEAK_TFLOPS`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def _vit_crop(vit: VitConfig, patches: int, patch_size: int) -> int:
    width = vit.hidden_size
    embedding = 2 * patches * 3 * patch_size**2 * width
    layer = 2 * patches * (4 * width**2 + 2 * width * vit.intermediate_size) + 4 * patches**2 * width
    return embedding + vit.num_layers * layer


def _connector_token(connector: ConnectorConfig, features: int, window: int, out: int) -> int:
    width, inner = connector.hidden_size, connector.intermediate_size
    pooling = 2 * (features * width * (1 + 2 * window) + width**2) + 4 * window * width
    return pooling + 2 * inner * (2 * width + out)


def _llm(text: TextConfig, work: Workload) -> int:
    d, queries, keys = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    token = 2 * (2 * d * queries + 2 * d * keys + 3 * d * text.intermediate_size)
    layers = text.num_layers * (work.num_tokens * token + 4 * work.num_pairs * queries)
    return layers + 2 * work.num_logits * d * text.vocab_size
