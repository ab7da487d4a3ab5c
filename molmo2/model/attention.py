"""Attention with Molmo2's mask; no S x S mask is materialized for long rows.

    dense   scaled dot product attention with the whole mask: short rows, generation, the reference for the others
    tiled   the same over tiles of queries, each with its own keys and piece of the mask: any device
    flex    FlexAttention over blocks of 128 x 128; per-block statistics find the empty and the full blocks: CUDA

All three take q [B, H, S, D], k and v [B, Hkv, S, D] with Hkv dividing H, and return [B, H, S, D]. `masked_attention`
chooses one. FlexAttention (`molmo2.model.flex`) is loaded on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from molmo2.model.decoder import Mask
from molmo2.model.mask import MEMBER, PAD_SEGMENT, AttentionMask, allowed, row_order

SHORT = 4096  # tiles of rows of at most this many tokens keep their pieces of the mask for backward
DENSE = 1024  # on CUDA, rows of at most this many tokens get a dense mask: computing every pair is cheap
TILE = 128  # queries in a tile of `tiled_attention`
# cuDNN is left out: it builds a plan for every new shape, and here nearly every shape is new.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_of_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in which the query heads of one key head are further queries of it.

    Not every kernel that takes a mask takes fewer key heads than query heads, but all take equal numbers. The keys are
    not copied, which decoding gains by.

    Args:
        q: [B, H, Q, D].
        k: [B, Hkv, K, D] with Hkv dividing H.
        v: [B, Hkv, K, D].
        mask: bool [B, 1, Q, K].
    """
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    rows = mask if queries == 1 else mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(q.reshape(batch, k.shape[1], group * queries, dim), k, v, attn_mask=rows)
    return out.reshape(batch, heads, queries, dim)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot product attention with a mask bool [B, 1, Q, K]."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(KERNELS):
        if grouped and (q.is_cuda or q.shape[2] == 1):  # a CPU's kernel takes groups, and is faster with more queries
            return attention_of_group(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention with the whole mask materialized."""
    return _attention(q, k, v, mask.dense())


class KeySpan(NamedTuple):
    """A tile of queries and the keys that any of them may see: [start, stop) each."""

    start: int
    stop: int
    first_key: int
    last_key: int


def key_spans(segment_ids: Tensor, is_visual: Tensor, order: Tensor | None = None, tile: int = TILE) -> list[KeySpan]:
    """Tiles of queries, each with the span of keys that contains every key its queries may see.

    A query sees no key of an earlier pack member, and a later key only if both are visual and of one member. Both ends
    of a span are exact if pack members are contiguous, as the loader makes them. The work of `tiled_attention`
    therefore grows with the squares of the members' lengths, not with the square of the row's length.

    Args:
        segment_ids: int [B, S].
        is_visual: bool [B, S].
        order: see `AttentionMask`.
        tile: number of queries in a tile.
    """
    length = segment_ids.shape[1]
    starts = range(0, length, tile)
    member = segment_ids // MEMBER
    valid = segment_ids != PAD_SEGMENT
    positions = torch.arange(length, device=segment_ids.device)
    order = row_order(segment_ids) if order is None else order
    bounds = []
    for start in starts:
        stop = min(start + tile, length)
        own, real = member[:, start:stop], valid[:, start:stop]
        lowest = own.masked_fill(~real, PAD_SEGMENT).amin(1, keepdim=True)
        highest = own.masked_fill(~real, -1).amax(1, keepdim=True)
        some_visual = (is_visual[:, start:stop] & real).any(1, keepdim=True)
        before = order <= order[:, start:stop].amax(1, keepdim=True)
        seen = valid & (member >= lowest) & (before | (some_visual & is_visual & (member <= highest)))
        bounds.append(
            torch.stack([torch.where(seen, positions, length).amin(), torch.where(seen, positions, -1).amax()])
        )
    key_bounds = torch.stack(bounds).tolist()  # one transfer from the device for all tiles
    spans = []
    for start, (first, last) in zip(starts, key_bounds, strict=True):
        stop = min(start + tile, length)
        spans.append(KeySpan(start, stop, min(first, start), max(stop, last + 1)))
    return spans


def _tile_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, span: KeySpan) -> Tensor:
    """Attention of one tile: q [B, H, tile, D], k and v [B, Hkv, keys, D] of the span."""
    queries, keys = slice(span.start, span.stop), slice(span.first_key, span.last_key)
    return _attention(q, k, v, allowed(*mask.vectors, queries, keys))


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Attention tile by tile: the largest piece of the mask is `TILE` x keys, and long rows recompute it in backward.

    Packs of short samples gain most, since dense attention computes every pair of the row.
    """
    spans = mask.made(key_spans)
    if torch.is_grad_enabled() and q.shape[2] > SHORT:
        return cast(Tensor, _RecomputedTiles.apply(q, k, v, mask, spans))
    outputs = [_tile(q, k, v, mask, span) for span in spans]
    return torch.cat(outputs, dim=2)


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, span: KeySpan) -> Tensor:
    keys = slice(span.first_key, span.last_key)
    rows = q[:, :, span.start : span.stop]
    return _tile_attention(rows, k[:, :, keys], v[:, :, keys], mask, span)


class _RecomputedTiles(torch.autograd.Function):
    """All tiles as one autograd operation that saves only its inputs.

    With plain autograd every tile would add a gradient of the whole row's length to the gradient of the keys, and this
    work would grow with the square of the row's length, whatever the mask.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, spans: list[KeySpan]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.spans = mask, spans
        out = torch.empty_like(q)
        for span in spans:
            out[:, :, span.start : span.stop] = _tile(q, k, v, mask, span)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        totals = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v)]
        for span in ctx.spans:
            rows, keys = slice(span.start, span.stop), slice(span.first_key, span.last_key)
            with torch.enable_grad():
                places = (rows, keys, keys)
                parts = [
                    tensor[:, :, place].detach().requires_grad_()
                    for tensor, place in zip((q, k, v), places, strict=True)
                ]
                out = _tile_attention(parts[0], parts[1], parts[2], ctx.mask, span)
            for total, place, part in zip(
                totals, places, torch.autograd.grad(out, parts, grads[0][:, :, rows]), strict=True
            ):
                total[:, :, place] += part
        return (*(total.to(tensor.dtype) for total, tensor in zip(totals, (q, k, v), strict=True)), None, None)


def choose_attention(device: torch.device, length: int) -> Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]:
    """The backend for rows of `length` tokens on a device."""
    if device.type != "cuda":
        return tiled_attention
    if length <= DENSE:
        return dense_attention
    from molmo2.model.flex import flex, has_triton

    return flex if has_triton() else tiled_attention


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention by the backend that suits the device and the length."""
    if not isinstance(mask, AttentionMask):  # a generated token
        return dense_attention(q, k, v, mask)
    return choose_attention(q.device, q.shape[2])(q, k, v, mask)
