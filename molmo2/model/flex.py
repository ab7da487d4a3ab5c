"""FlexAttention with Molmo2's mask, for long rows on a GPU: per-block statistics find the empty and the full blocks.

The kernels are Triton's, or FlashAttention-4's on a Hopper GPU on which the extra `hopper` is installed. FlexAttention
has no backward on a CPU, and this module is not loaded there.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from molmo2.model.mask import BLOCK, MEMBER, PAD_SEGMENT, AttentionMask, row_order


def _blocks(values: Tensor, fill: Any) -> Tensor:
    """Reshape [B, S] to [B, blocks, BLOCK]; the last block is padded with `fill`."""
    missing = -values.shape[1] % BLOCK
    return F.pad(values, (0, missing), value=fill).unflatten(1, (-1, BLOCK))


def block_tables(segment_ids: Tensor, is_visual: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Classify the blocks of 128 queries x 128 keys as mixed, full or empty; the vectors are those of `AttentionMask`.

    The classes follow from the smallest and largest segment id and order of every block, so no S x S tensor is made. A
    block that these intervals do not decide counts as mixed, which costs time and changes no result.

    Returns:
        `mixed` and `full`, bool [B, blocks, blocks]: query blocks by key blocks. In a full block every pair is
        allowed; a block that is neither is empty.
    """
    segments = _blocks(segment_ids, PAD_SEGMENT)
    valid = segments != PAD_SEGMENT
    visual = _blocks(is_visual, False) & valid
    low, high = segments.amin(2), segments.amax(2)  # padding counts as the highest
    highest_valid = segments.masked_fill(~valid, -1).amax(2)
    first_member = segments.masked_fill(~visual, PAD_SEGMENT).amin(2) // MEMBER  # visual tokens only
    last_member = segments.masked_fill(~visual, -1).amax(2) // MEMBER
    order = row_order(segment_ids) if order is None else order
    first_order, last_order = _blocks(order, segment_ids.shape[1]).amin(2), _blocks(order, -1).amax(2)
    same = torch.eye(low.shape[1], dtype=torch.bool, device=low.device)

    def pairs(relation: Callable[[Tensor, Tensor], Tensor], query: Tensor, key: Tensor) -> Tensor:
        return relation(query[:, :, None], key[:, None, :])

    some_vision = pairs(torch.le, first_member, last_member) & pairs(torch.ge, last_member, first_member)
    one_member = visual.all(2) & (first_member == last_member)
    all_vision = pairs(torch.logical_and, one_member, one_member) & pairs(torch.eq, first_member, first_member)
    reaches = pairs(torch.le, low, highest_valid) & (pairs(torch.ge, last_order, first_order) | some_vision)
    earlier = pairs(torch.ge, first_order, last_order)  # all of the block's keys are
    full = valid.all(2)[:, None, :] & pairs(torch.le, high, low) & (earlier | all_vision)
    return (reaches | same) & ~full, full


def block_mask(segment_ids: Tensor, is_visual: Tensor, order: Tensor | None = None) -> BlockMask:
    """FlexAttention's form of the mask; the vectors are those of `AttentionMask`."""
    length = segment_ids.shape[1]
    mixed, full = block_tables(segment_ids, is_visual, order)

    def listed(table: Tensor) -> tuple[Tensor, Tensor]:
        """Number of blocks in each row [B, 1, n], and their numbers first [B, 1, n, n]."""
        numbers = table.int().argsort(dim=2, descending=True, stable=True).int()
        return table.sum(2, dtype=torch.int32)[:, None], numbers[:, None]

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_segment, key_segment = segment_ids[batch, query], segment_ids[batch, key]
        both_visual = is_visual[batch, query] & is_visual[batch, key]
        same_member = query_segment // MEMBER == key_segment // MEMBER
        seen = (key_segment != PAD_SEGMENT) & (query_segment <= key_segment)
        not_later = key <= query if order is None else order[batch, key] <= order[batch, query]
        return (seen & (not_later | (both_visual & same_member))) | (query == key)

    return BlockMask.from_kv_blocks(
        *listed(mixed), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )


@functools.cache
def _compiled_flex(tuned: bool) -> Any:
    # One graph has to serve all lengths. With `fullgraph`, compilation that gives up raises FailOnRecompileLimitHit;
    # otherwise the uncompiled function would run, and it materializes S x S scores.
    mode = "max-autotune-no-cudagraphs" if tuned else None
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, mode=mode)


@functools.cache
def kernel_options(device: torch.device) -> dict[str, Any]:
    """FlashAttention-4's kernels on a Hopper GPU where they are installed, else FlexAttention's default."""
    try:
        installed = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        installed = False
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return {"BACKEND": "FLASH"} if installed and hopper else {}


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: dict[str, Any] | None = None, tuned: bool = True
) -> Tensor:
    """FlexAttention, compiled for rows of any length.

    Args:
        q: [B, H, S, D].
        k: [B, Hkv, S, D] with Hkv dividing H.
        v: [B, Hkv, S, D].
        mask: the mask.
        options: FlexAttention's `kernel_options`; None: those of `kernel_options`.
        tuned: choose the fastest of Triton's kernels when the first backward pass is compiled; inference never waits
            for that.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: the kernel was compiled for too many kinds of input.
    """
    run = _compiled_flex(tuned and torch.is_grad_enabled())
    return run(
        q,
        k,
        v,
        block_mask=mask.made(block_mask),
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernel_options(q.device) if options is None else options,
    )


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; the first call warns if it is not."""
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is not installed, so attention of long rows runs tile by tile on the GPU, several times slower than by "
        "FlexAttention; install triton",
        stacklevel=2,
    )
    return False
