"""The connector: it pools windows of patches to visual tokens, for images and frames alike.

Each visual token has the indices of up to nine patches. Their mean is the query of an attention over them; a SwiGLU
projector maps the result to the width of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2.model.presets import ConnectorConfig, TextConfig, VitConfig


class AttentionPooling(nn.Module):
    """Attention pooling: the query is the mean of a window, keys and values are the patches of the window."""

    def __init__(self, config: ConnectorConfig, feature_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(feature_size, config.hidden_size)
        self.k_proj = nn.Linear(feature_size, config.hidden_size)
        self.v_proj = nn.Linear(feature_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, windows: Tensor, valid: Tensor) -> Tensor:
        """Pool windows [T, P, features], valid bool [T, P], to [T, hidden].

        The softmax over at most nine keys is written out: fused kernels are made for many keys and few rows, and some
        plan every new T. The attention over a window without valid patches is zero.
        """
        query = windows.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None].to(windows.dtype)
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1))
            for proj, x in ((self.q_proj, query), (self.k_proj, windows), (self.v_proj, windows))
        )
        # Scores and sums are float32, as in the fused kernels.
        scores = (q.float() * k).sum(-1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~valid[..., None], float("-inf")).softmax(1).masked_fill(~valid[..., None], 0)
        return self.o_proj((weights[..., None] * v).sum(1).flatten(1).to(v.dtype))


class Connector(nn.Module):
    """Maps patch features and pooling indices to features of the language model's width."""

    def __init__(self, config: ConnectorConfig, vit: VitConfig, text: TextConfig) -> None:
        super().__init__()
        self.pooling = AttentionPooling(config, vit.hidden_size * len(vit.feature_layers))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, text.hidden_size, bias=False)

    def forward(self, features: Tensor, pooling: Tensor) -> Tensor:
        """Map features [N, patches, C] to [T, d]. `pooling`: int64 [T, P], flat patch indices, -1 pads."""
        valid = pooling >= 0
        # A pad reads a patch of its own window. If all pads read one patch, backward would add all their gradients to
        # that one row, one after the other.
        places = torch.where(valid, pooling, pooling.amax(1, keepdim=True).clamp(min=0))
        windows = features.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, pooling.shape)
        windows = windows * valid[..., None].to(features.dtype)
        pooled = self.pooling(windows, valid)
        return self.down_proj(F.silu(self.gate_proj(pooled)) * self.up_proj(pooled))
