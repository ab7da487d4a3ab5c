"""Weighted cross entropy with z-loss, computed only for the rows that carry loss.

The result is the sum over the local rows, not their mean. The trainer divides by the loss weight of the whole step, so
that a token's weight does not depend on its rank, micro-batch or pack. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**30  # logits and their gradients of one chunk of rows fill about this many bytes
BYTES_PER_LOGIT = 12  # a logit and its gradient, each in bf16 and in fp32


class LossSums(NamedTuple):
    """Sums over local rows in fp32.

    Attributes:
        cross_entropy: scalar, weight * ce.
        z: scalar, z_loss * weight * logsumexp^2.
        dataset_loss: [datasets], weight * ce of each dataset's rows; for the log, without gradient.
        dataset_weight: [datasets], the weight of each dataset's rows.
    """

    cross_entropy: Tensor
    z: Tensor
    dataset_loss: Tensor
    dataset_weight: Tensor


def rows_per_chunk(vocabulary: int) -> int:
    """The number of rows whose logits and gradients fill about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (BYTES_PER_LOGIT * vocabulary))


def weighted_loss(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: Callable[[Tensor], Tensor],
    z_loss: float,
    chunk_rows: int,
    num_chunks: int = 1,
    datasets: Tensor | None = None,
    num_datasets: int = 1,
) -> LossSums:
    """Sum the loss of the rows with weight > 0.

    Args:
        hidden: [..., d], final-normed; one row or more.
        labels: [...] int64, already shifted.
        weights: [...] float32.
        head: rows [n, d] -> logits [n, vocabulary]; it must be the module that owns the weight, so that its hooks run.
        z_loss: factor of the z-loss.
        chunk_rows: rows whose logits exist at once; each chunk is recomputed in backward.
        num_chunks: the minimum number of chunks; extra ones compute a row of weight 0. Under ZeRO-3 every call of
            `head` is a collective, so all ranks must agree on the number. It is at least 1, so that a rank without
            any row calls `head` too.
        datasets: [...] int64, the dataset of each row, below `num_datasets`; None: all rows are of dataset 0.
        num_datasets: number of datasets with sums of their own.

    Returns:
        The sums; the first two are connected to `hidden` and to the head even when no row carries loss.
    """
    rows, labels, weights = hidden.flatten(0, -2), labels.flatten(), weights.flatten()
    datasets = torch.zeros_like(labels) if datasets is None else datasets.flatten()
    chunks = (weights > 0).nonzero().squeeze(1).split(chunk_rows)
    idle = torch.zeros(1, dtype=torch.int64, device=rows.device)
    sums = rows.new_zeros(2, dtype=torch.float32)
    dataset_loss, dataset_weight = rows.new_zeros(2, num_datasets, dtype=torch.float32)
    for part in range(max(num_chunks, len(chunks))):
        busy = part < len(chunks) and len(chunks[part]) > 0
        index = chunks[part] if busy else idle
        weight = weights[index] * busy
        inputs = (rows.index_select(0, index), labels[index], weight, head, z_loss)
        both, cross_entropy = checkpoint(_chunk_sums, *inputs, use_reentrant=False, preserve_rng_state=False)
        sums = sums + both
        dataset_loss.index_add_(0, datasets[index], weight * cross_entropy.detach())
        dataset_weight.index_add_(0, datasets[index], weight)
    return LossSums(sums[0], sums[1], dataset_loss, dataset_weight)


def _chunk_sums(
    rows: Tensor, labels: Tensor, weights: Tensor, head: Callable[[Tensor], Tensor], z: float
) -> tuple[Tensor, Tensor]:
    """The sums of cross entropy and z-loss [2], and the cross entropy of each row [n]."""
    logits = head(rows).float()
    lse = logits.logsumexp(-1)
    cross_entropy = lse - logits.gather(-1, labels[:, None]).squeeze(-1)
    return torch.stack([(weights * cross_entropy).sum(), z * (weights * lse.square()).sum()]), cross_entropy
