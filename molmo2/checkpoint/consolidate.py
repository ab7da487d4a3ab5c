"""Float32 weights from DeepSpeed's checkpoint files: a function for each tensor, which reads that tensor alone.

The files are mapped, not read: one file a rank under ZeRO, in which the master weights of all tensors lie end to end in
flat vectors, and the files of the model, from which frozen weights and, at ZeRO stage 0, all weights are taken.

    ZeRO 1, 2    one vector for each optimizer group, cut into equal parts; rank r has part r
    ZeRO 3       every tensor is cut into equal parts; a rank's vectors hold its parts of all tensors, group by group
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIX = "model."  # begins the names of the model's parameters inside `TrainingModule`
WHOLE = "mp_rank_00_model_states.pt"  # the file with the model's states for all ranks (ZeRO 0-2)
Readers = dict[str, Callable[[], Tensor]]  # each call reads the tensor again, into memory of its own


def open_states(states: Path) -> Readers:
    """Find the weights in a folder of DeepSpeed's files; a tensor with two names is given once, by its first name."""
    parts = [part["optimizer_state_dict"] for part in _map_all(states, "*_optim_states.pt")]
    models = _map_all(states, "*_model_states.pt")
    if (states / WHOLE).exists():
        readers = _whole(models[0]["module"]) | (_cut_groups(models[0], parts) if parts else {})
    else:
        readers = _cut_tensors(models, parts)
    return {name.removeprefix(PREFIX): read for name, read in readers.items()}


def _map_all(states: Path, pattern: str) -> list[dict[str, Any]]:
    """Map the files of all ranks, in the order of the ranks; `find_damage` has checked what their pickles name."""
    files = sorted(states.glob(pattern), key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])
    return [torch.load(file, map_location="cpu", mmap=True, weights_only=False) for file in files]


def _whole(module: dict[str, Tensor]) -> Readers:
    readers: Readers = {}
    seen: set[int] = set()
    for name, tensor in module.items():
        if tensor.data_ptr() not in seen:
            readers[name] = partial(tensor.to, torch.float32, copy=True)
        seen.add(tensor.data_ptr())
    return readers


def _cut_groups(model: dict[str, Any], parts: list[dict[str, Any]]) -> Readers:
    """The trained weights under ZeRO 1 and 2."""
    readers: Readers = {}
    paddings = parts[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        vectors = [part["single_partition_of_fp32_groups"][group] for part in parts]
        start = 0
        for number, (name, shape) in enumerate(shapes.items()):
            readers[name] = partial(_read_group, vectors, start, shape)
            start += shape.numel() + (paddings[group][number] if paddings else 0)
    return readers


def _read_group(vectors: Sequence[Tensor], start: int, shape: torch.Size) -> Tensor:
    return torch.cat(_pieces(vectors, start, shape.numel())).view(shape)


def _cut_tensors(models: list[dict[str, Any]], parts: list[dict[str, Any]]) -> Readers:
    """All weights under ZeRO 3; every rank has the model's frozen weights in its file of the model."""
    readers: Readers = {}
    start = 0
    vectors = [part["fp32_flat_groups"] for part in parts]
    for name, shape in (item for shapes in models[0]["param_shapes"] for item in shapes.items()):
        length = -(-shape.numel() // len(parts))
        readers[name] = partial(_read_tensor, [partial(_pieces, vector, start, length) for vector in vectors], shape)
        start += length
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        length = -(-shape.numel() // len(models))
        fragments = [model["frozen_param_fragments"][name].view(-1) for model in models]
        readers[name] = partial(_read_tensor, [partial(_pieces, [part], 0, length) for part in fragments], shape)
    return readers


def _read_tensor(ranks: Sequence[Callable[[], list[Tensor]]], shape: torch.Size) -> Tensor:
    """Join the parts of all ranks; the last may be padded."""
    joined = torch.cat([piece for pieces in ranks for piece in pieces()])
    return joined[: shape.numel()].view(shape).float()


def _pieces(vectors: Sequence[Tensor], start: int, length: int) -> list[Tensor]:
    """The elements from `start` on of vectors that lie end to end."""
    pieces = []
    for vector in vectors:
        piece = vector[start : start + length] if start < vector.numel() else vector[:0]
        pieces.append(piece)
        start, length = max(0, start - vector.numel()), length - piece.numel()
    return pieces
