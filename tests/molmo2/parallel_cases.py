"""What the ranks of test_ulysses, test_vision_split and test_loss_rows do; many cases in one launch."""

from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention

from molmo2.model.loss import weighted_loss
from molmo2.parallel.gather import take_loss_rows
from molmo2.parallel.mesh import gather_machines, make_mesh
from molmo2.parallel.places import find_loss_places, find_visual_places
from molmo2.parallel.ulysses import ulysses
from molmo2.parallel.vision import encode_shared
from shards.split import split_visuals

LENGTH, DIM = 24, 4


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Plain grouped attention; `mask` [B, 1, S, S] is of the whole sequence."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attention_inputs(num_heads: int, num_kv_heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(num_heads * 100 + num_kv_heads)
    shapes = [(2, heads, LENGTH, DIM) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]  # q, k, v and the output's gradient
    mask = (torch.rand(2, 1, LENGTH, LENGTH, generator=generator) > 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    return tensors, mask


def attention(cases: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    """For each (heads, kv heads): output and the gradients of q, k, v, of this rank's slice."""
    mesh = make_mesh(dist.get_world_size())
    results = []
    for num_heads, num_kv_heads in cases:
        tensors, mask = attention_inputs(num_heads, num_kv_heads)
        step = LENGTH // mesh.sp
        rows = slice(mesh.sp_rank * step, (mesh.sp_rank + 1) * step)
        q, k, v = (tensor[:, :, rows].clone().requires_grad_() for tensor in tensors[:3])
        out = ulysses(attend, mesh, num_heads, num_kv_heads)(q, k, v, mask)
        out.backward(tensors[3][:, :, rows])
        results.append([out.detach(), q.grad, k.grad, v.grad])
    return results  # type: ignore[return-value]


def both_attentions(cases: list[tuple[int, int]]) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """The results of `attention`, and the same computed by DeepSpeed's own Ulysses layer."""
    deepspeed.init_distributed(verbose=False)
    mesh = make_mesh(dist.get_world_size())

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

    results = []
    for num_heads, num_kv_heads in cases:
        tensors, mask = attention_inputs(num_heads, num_kv_heads)
        step = LENGTH // mesh.sp
        rows = slice(mesh.sp_rank * step, (mesh.sp_rank + 1) * step)
        q, k, v = (tensor[:, :, rows].clone().requires_grad_() for tensor in tensors[:3])
        layer = DistributedAttention(local, mesh.sp_group, scatter_idx=2, gather_idx=1)
        out = layer(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0, None, mask).transpose(1, 2)
        out.backward(tensors[3][:, :, rows])
        results.append([out.detach(), q.grad, k.grad, v.grad])
    return attention(cases), results


def machines(argument: None) -> list[str]:
    """The machines that ranks find, where each calls its own by its rank."""
    with mock.patch("platform.node", lambda: f"machine {dist.get_rank()}"):
        return gather_machines()


PATCHES, CROP = 4, 4


def vision_inputs(crops: list[int], tokens: list[int]) -> tuple[torch.Tensor, ...]:
    """Pixels, pooling indices that stay inside each visual, and one weight per pooled token."""
    generator = torch.Generator().manual_seed(sum(crops))
    pixels = torch.randint(0, 256, (sum(crops), CROP, CROP, 3), generator=generator, dtype=torch.uint8)
    pooling, first = [], 0
    for num_crops, num_tokens in zip(crops, tokens, strict=True):
        index = torch.randint(0, num_crops * PATCHES, (num_tokens, 3), generator=generator)
        index[:, 2] = torch.where(torch.rand(num_tokens, generator=generator) > 0.5, index[:, 2], -1 - first)
        pooling.append((index + first).clamp(min=-1))
        first += num_crops * PATCHES
    weight = torch.randn(sum(tokens), 5, generator=generator)
    return pixels, torch.cat([*pooling, torch.zeros(0, 3, dtype=torch.int64)]), weight


def encoder(projection: torch.Tensor) -> Any:
    """A stand-in tower: one linear map of each patch, then a masked mean over the pooled patches."""

    def encode(pixels: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        patches = (pixels.float() / 255).reshape(len(pixels) * PATCHES, 12) @ projection
        valid = (pooling >= 0).unsqueeze(-1)
        return (patches[pooling.clamp(min=0)] * valid).sum(1) / valid.sum(1).clamp(min=1)

    return encode


def vision(cases: list[tuple[list[int], list[int]]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each case: the gathered features, and the gradient of the tower summed over the ranks.

    Each rank uses every other pooled token, as ranks of a group use the features of their own rows only.
    """
    mesh = make_mesh(dist.get_world_size())
    results = []
    for crops, tokens in cases:
        projection = torch.linspace(-1, 1, 12 * 5).reshape(12, 5).requires_grad_()
        pixels, pooling, weight = vision_inputs(crops, tokens)
        counts = torch.tensor(crops, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
        pixels = pixels[torch.from_numpy(split_visuals(crops, tokens, mesh.sp)[mesh.sp_rank].crops)]
        places = find_visual_places(pooling, *counts, PATCHES, mesh)
        features, touch = encode_shared(encoder(projection), pixels, places, CROP, mesh)
        own = torch.arange(len(features)) % mesh.sp == mesh.sp_rank
        ((features * weight).sum(1)[own].sum() + touch).backward()
        assert projection.grad is not None  # the tower ran, also on a rank without a visual
        gradient = projection.grad.clone()
        dist.all_reduce(gradient)
        results.append((features.detach(), gradient))
    return results


ROW_LENGTH, WIDTH, WORDS = 12, 6, 20
ROW_CASES = {  # which of the 12 columns of two rows carry loss
    "all on the last rank": [(0, 11), (1, 11), (1, 10), (0, 10), (0, 9)],
    "everywhere": [(row, column) for row in range(2) for column in range(ROW_LENGTH)],
    "one row": [(1, 2)],
    "none": [],
}


def row_inputs(places: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Hidden states [2, 12, d] and a head, both to be differentiated; labels, weights."""
    generator = torch.Generator().manual_seed(len(places))
    hidden = torch.randn(2, ROW_LENGTH, WIDTH, generator=generator)
    head = torch.randn(WORDS, WIDTH, generator=generator)
    labels = torch.randint(0, WORDS, (2, ROW_LENGTH), generator=generator)
    weights = torch.zeros(2, ROW_LENGTH)
    for row, column in places:
        weights[row, column] = 0.5 + 0.25 * column
    return hidden, head, labels, weights


def loss_of(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, chunk_rows: int
) -> torch.Tensor:
    """The loss of rows with its z term, under a head that is a matrix."""
    options = {"labels": labels.flatten(), "weights": weights.flatten(), "z_loss": 1e-4, "chunk_rows": chunk_rows}
    sums = weighted_loss(hidden.flatten(0, -2), lambda x: x @ head.T, **options)
    return sums.cross_entropy + sums.z


def loss_rows(
    cases: dict[str, list[tuple[int, int]]],
) -> dict[str, tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each case: rows with weight that this rank got, its loss, and the gradients of its slice and of the head."""
    mesh = make_mesh(dist.get_world_size())
    results = {}
    for name, places in cases.items():
        hidden, head, labels, weights = row_inputs(places)
        step = ROW_LENGTH // mesh.sp
        slice_ = hidden[:, mesh.sp_rank * step : (mesh.sp_rank + 1) * step].clone().requires_grad_()
        head.requires_grad_()
        rows = find_loss_places(labels, weights, labels, mesh)
        assert torch.equal(rows.datasets, rows.labels)
        hidden = take_loss_rows(slice_, rows, mesh)
        loss = loss_of(hidden, head, rows.labels, rows.weights, chunk_rows=2)
        loss.backward()
        assert slice_.grad is not None and head.grad is not None
        results[name] = (int((rows.weights > 0).sum()), loss.detach(), slice_.grad, head.grad)
    return results
