"""The language model: Qwen3's structure, or Olmo-3's, as Molmo2 uses them.

The attention function is an argument, `attend(q, k, v, mask)`, so the model does not depend on sequence parallelism.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2.model.dropout import Dropout
from molmo2.model.presets import TextConfig
from molmo2.model.recompute import recomputed


class Mask(Protocol):
    """Anything with a dense form, bool [B, 1, queries, keys]."""

    def dense(self) -> Tensor:
        """Bool [B, 1, queries, keys]."""


# q [B, H, Q, D]; k, v [B, Hkv, K, D] with Hkv dividing H; mask; result [B, H, Q, D].
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


Extend = Callable[..., tuple[Tensor, Tensor]]  # (number of a layer, new keys and values) -> all keys and values of it


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., size] over the last dim."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_frequencies(config: TextConfig, layer: int) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2] of a layer, and the factor on cosine and sine.

    YaRN (arXiv 2309.00071, section 3.2): low frequencies are interpolated by `factor`, high ones kept, with a linear
    ramp between the dimensions that turn `beta_slow` and `beta_fast` times over the original context.
    """
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None or layer not in scaling.layers:
        return frequencies, 1.0

    def dimension(turns: float) -> float:
        return (
            dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp), scaling.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation form: x [B, H, S, D], cos and sin [B, 1, S, D]."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim, self.per_head = config.head_dim, config.qk_norm == "qwen3"
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim if self.per_head else queries, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim if self.per_head else keys, config.norm_eps)

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is not None and not self.per_head:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.per_head:
            x = norm(x)
        return x.transpose(1, 2)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and values [B, Hkv, S, D] of x [B, S, d]."""
        q = rotate(self._heads(self.q_proj(x), self.q_norm), *rope)
        k = rotate(self._heads(self.k_proj(x), self.k_norm), *rope)
        return q, k, self._heads(self.v_proj(x), None)


class Layer(nn.Module):
    """One decoder layer; with `norm_after` the norms act on the outputs of the sublayers (Olmo-3).

    It has two halves, before and after attention, and each is one graph when compiled.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm_after = config.norm_after
        self.attention = SelfAttention(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def pre(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, S, d]; see `SelfAttention.project`."""
        return self.attention.project(x if self.norm_after else self.attention_norm(x), rope)

    def post(self, x: Tensor, attended: Tensor, dropout: Dropout | None = None, keys: Tensor | None = None) -> Tensor:
        """The output [B, S, d] of x and the attention's result [B, H, S, D]; `keys` [2, B, 2] of the sublayers."""
        added = self.attention.o_proj(attended.transpose(1, 2).flatten(2))
        added = self.attention_norm(added) if self.norm_after else added
        x = x + (added if dropout is None or keys is None else dropout(added, keys[0]))
        added = self.mlp_norm(self._mlp(x)) if self.norm_after else self._mlp(self.mlp_norm(x))
        return x + (added if dropout is None or keys is None else dropout(added, keys[1]))


class Embedding(nn.Module):
    """Token embeddings: the base table, and a separate table for the added tokens."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.added = nn.Parameter(torch.empty(config.additional_vocab_size, config.hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed int64 [B, S] to [B, S, d], with two look-ups: joining the tables would copy them in every step."""
        size = self.base.shape[0]
        is_added = input_ids >= size
        base = F.embedding(input_ids.masked_fill(is_added, 0), self.base)
        added = F.embedding((input_ids - size).masked_fill(~is_added, 0), self.added)
        return torch.where(is_added[..., None], added, base)


class Decoder(nn.Module):
    """The decoder layers: embeddings to final hidden states.

    `pre` and `post` are the halves of a layer, of which `compile_regions` puts compiled ones into an instance.
    """

    pre: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(Layer.pre)
    post: Callable[..., Tensor] = staticmethod(Layer.post)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute, self.offload = "none", False  # see `Molmo2.set_recompute`
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def rope(self, position_ids: Tensor) -> dict[bool, tuple[Tensor, Tensor]]:
        """Cosine and sine, float32 [B, 1, S, D], without (False) and with (True) scaling, as the layers need them."""
        scaled = set(self.config.rope_scaling.layers) if self.config.rope_scaling else set()
        tables = {}
        for kind in {number in scaled for number in range(self.config.num_layers)}:
            layer = next(number for number in range(self.config.num_layers) if (number in scaled) == kind)
            frequencies, factor = rope_frequencies(self.config, layer)
            angles = position_ids[:, None, :, None].float() * frequencies.to(position_ids.device)
            angles = torch.cat([angles, angles], dim=-1)
            tables[kind] = (angles.cos() * factor, angles.sin() * factor)
        return tables

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: Mask,
        attend: Attend,
        extend: Extend | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Map embeddings [B, S, d] and positions [B, S] to final-normed hidden states [B, S, d]."""
        tables = self.rope(position_ids)
        scaled = self.config.rope_scaling.layers if self.config.rope_scaling else ()
        keys = None if dropout is None else dropout.keys(2 * len(self.layers)).unflatten(0, (-1, 2))
        for number, layer in enumerate(self.layers):
            past = None if extend is None else functools.partial(extend, number)
            place = None if keys is None else keys[number]
            x = self.run_layer(layer, x, tables[number in scaled], mask, attend, past, dropout, place)
        return self.norm(x)

    def run_layer(self, layer: nn.Module, x: Tensor, *others: Any) -> Tensor:
        """Map x [B, S, d] to [B, S, d] by one layer, and save for backward what `recompute` says.

        `others`: cosine and sine, mask, attention, and of the cache, the dropout and its keys what there is.
        """
        level = self.recompute if self.training else "none"
        if level != "full":
            return self._run_halves(layer, level == "light", x, *others)
        return recomputed(functools.partial(self._run_halves, layer, False), x, *others, offload=self.offload)

    def _run_halves(
        self,
        layer: nn.Module,
        light: bool,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        attend: Attend,
        extend: Extend | None = None,
        dropout: Dropout | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        pre, post = functools.partial(self.pre, layer), functools.partial(self.post, layer)
        if light:  # queries, keys and values are inputs of attention, which saves them with its result
            pre, post = (functools.partial(recomputed, half, offload=False) for half in (pre, post))
        q, k, v = pre(x, rope)
        if extend is not None:
            k, v = extend(k, v)
        return post(x, attend(q, k, v, mask), dropout, keys)
