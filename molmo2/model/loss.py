"""Weighted cross entropy with z-loss, computed in chunks of rows, and the head inside which that is done.

The result is the sum over the local rows, not their mean. The trainer divides by the loss weight of the whole step, so
that a token's weight does not depend on its rank, micro-batch or pack. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits and their gradients of one chunk of rows fill about this many bytes: as written, and compiled.
CHUNK_BYTES = {False: 2**30, True: 2**31}
# A logit and its gradient, each in bf16 and in fp32; a compiled chunk keeps the logit in bf16 and its gradient in fp32.
BYTES_PER_LOGIT = {False: 12, True: 6}


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


def rows_per_chunk(vocabulary: int, compiled: bool = False) -> int:
    """The number of rows whose logits and gradients fill about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES[compiled] // (BYTES_PER_LOGIT[compiled] * vocabulary))


def chunk_sums(
    rows: Tensor, labels: Tensor, weights: Tensor, head: Callable[[Tensor], Tensor], z: float
) -> tuple[Tensor, Tensor]:
    """The sums of cross entropy and z-loss [2], and the cross entropy of each row [n]."""
    logits = head(rows).float()
    lse = logits.logsumexp(-1)
    cross_entropy = lse - logits.gather(-1, labels[:, None]).squeeze(-1)
    return torch.stack([(weights * cross_entropy).sum(), z * (weights * lse.square()).sum()]), cross_entropy


class Head(nn.Linear):
    """The language model's head, which maps hidden states to logits.

    `chunk_sums` is that of `weighted_loss`; `compile_regions` puts a compiled function into an instance.
    """

    chunk_sums = staticmethod(chunk_sums)

    def forward(self, rows: Tensor, use: Callable[[Tensor, Callable[[Tensor], Tensor]], Any] | None = None) -> Any:
        """The logits of `rows`, or `use(rows, head)`, in which `head` may be called any number of times.

        Under ZeRO-3 every call of a module is a collective. A call of `use` is one, however many rows a rank has.
        """
        return super().forward(rows) if use is None else use(rows, super().forward)


def weighted_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    labels: Tensor,
    weights: Tensor,
    z_loss: float,
    chunk_rows: int,
    sums_of: Callable[..., tuple[Tensor, Tensor]] = chunk_sums,
    datasets: Tensor | None = None,
    num_datasets: int = 1,
) -> LossSums:
    """Sum the loss of rows; rows without weight cost as much as others, so the caller leaves them out.

    Args:
        hidden: [n, d], final-normed; one row or more.
        head: rows [n, d] -> logits [n, vocabulary].
        labels: [n] int64, already shifted.
        weights: [n] float32.
        z_loss: factor of the z-loss.
        chunk_rows: rows whose logits exist at once; each chunk is recomputed in backward.
        sums_of: `chunk_sums`, or its compiled form.
        datasets: [n] int64, the dataset of each row, below `num_datasets`; None: all rows are of dataset 0.
        num_datasets: number of datasets with sums of their own.

    Returns:
        The sums; the first two are connected to `hidden` and to the head even when no row carries loss.
    """
    sums, parts = hidden.new_zeros(2, dtype=torch.float32), []
    for chunk in zip(hidden.split(chunk_rows), labels.split(chunk_rows), weights.split(chunk_rows), strict=True):
        both, part = checkpoint(sums_of, *chunk, head, z_loss, use_reentrant=False, preserve_rng_state=False)
        sums = sums + both
        parts.append(part.detach())
    datasets = torch.zeros_like(labels) if datasets is None else datasets
    empty = hidden.new_zeros(num_datasets, dtype=torch.float32)
    return LossSums(
        cross_entropy=sums[0],
        z=sums[1],
        dataset_loss=empty.index_add(0, datasets, weights * torch.cat(parts)),
        dataset_weight=empty.index_add(0, datasets, weights),
    )
