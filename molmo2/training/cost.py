"""What packs and batches cost to compute: operations for MFU, the cost by which packs are dealt, and how ranks balance.

`molmo2.model.flops` has the formulas. Time is measured in `molmo2.training.metrics`.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from molmo2.config import Recipe
from molmo2.model.flops import Workload, forward_flops, known_peak, training_flops, unit_costs
from molmo2.model.presets import ModelConfig
from shards.stream.balance import PackCost
from shards.stream.collate import Batch


def pack_cost(recipe: Recipe, config: ModelConfig) -> PackCost:
    """The cost by which the packs of a step are dealt to the ranks: the recipe's, or operations."""
    if (given := recipe.train.pack_cost) is not None:
        return PackCost(given.token, given.crop, given.pair)
    return PackCost(*unit_costs(config, recipe.frozen, recipe.train.recompute))


def batch_flops(batch: Batch, config: ModelConfig, frozen: Collection[str]) -> int:
    """Operations of forward and backward over a micro-batch, all ranks of its group together; nothing is copied."""
    work = Workload(
        num_crops=batch.work.crops,
        num_visual_tokens=len(batch.pooling),
        pool_width=batch.pooling.shape[1],
        num_tokens=batch.input_ids.numel(),
        num_pairs=batch.work.pairs,
        num_logits=batch.work.loss_tokens,
    )
    return training_flops(forward_flops(config, work), frozen).total


def speed(flops: float, seconds: float, world: int, peak_tflops: float | None) -> dict[str, float]:
    """TFLOP/s of a rank in a step of `flops` operations over all ranks, and MFU: its part of the peak, if known."""
    tflops = flops / seconds / world / 1e12
    peak = peak_tflops or known_peak()
    return {"tflops": tflops, **({"mfu": tflops / peak} if peak else {})}


def measured_balance(seconds: Tensor) -> dict[str, float]:
    """How the ranks shared the work of a step, from their own forward times, [dp, micro-steps].

    Under ZeRO-3 a forward pass waits for other ranks' parameters, so all look equally slow.

    Returns:
        working_share: share of the time in which ranks work if each micro-step ends with its slowest rank.
        slowest_rank: the data-parallel rank with the largest sum. One rank alone has neither.
    """
    if len(seconds) == 1:
        return {}
    lasted = len(seconds) * seconds.amax(dim=0).sum().item()
    return {
        "working_share": seconds.sum().item() / max(lasted, 1e-9),
        "slowest_rank": int(seconds.sum(dim=1).argmax()),
    }
