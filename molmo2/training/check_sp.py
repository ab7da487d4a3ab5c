"""A check before training: a pack must give the same loss and gradients on one rank and on a group of ranks.

    deepspeed molmo2/train.py --recipe recipes/demo/stage3.yaml --check-sp

It catches what no test on another machine can: a library whose collectives or attention kernels differ here. It runs
the run's weights, dtype, recomputation and attention backend on a random pack of the run's length (a long one: a
quarter), and compares the loss and the gradient of every parameter.

It needs no engine: each rank has a copy of the whole model, the gradients of one rank are kept in host memory, and the
mean over ranks is taken here. Reduction by DeepSpeed, the optimizer, LoRA, frozen
parameters and compilation are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.config import Recipe
from molmo2.model.attention import SHORT
from molmo2.model.mask import BLOCK, MEMBER, PAD_SEGMENT, TRUNK
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig
from molmo2.parallel.mesh import SINGLE, Mesh, MeshError
from molmo2.training.engine import TrainingModule
from shards.stream.collate import Batch, own_crops
from shards.stream.plan import Cursor

WHOLE = 2 * SHORT  # runs of packs up to this length are checked at their own length
IMAGE_CROPS = 3  # crops of an image in the pack; a frame has one
NAMED = 5  # parameters that an error names
TINY = 1e-30  # a norm below this is zero, as of a component that the loss does not depend on


class Tolerance(NamedTuple):
    """The largest relative differences that are accepted, and the gradients that count as zero.

    A gradient that vanishes mathematically (a key bias) is rounding alone and has no scale: a difference is taken
    relative to the parameter's gradient, or to `floor` times the component's if that is larger (root mean squares).
    """

    loss: float
    gradient: float
    floor: float


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Rounding measured on a CPU: float32 up to 1e-7 of the loss and 1e-5 of a gradient, bfloat16 up to 0.11 of a gradient
# (24 layers of text, 12 of vision). A wrong head, scale or slice changes gradients by half or more.
TOLERANCES = {"fp32": Tolerance(1e-4, 1e-3, 1e-2), "bf16": Tolerance(1e-2, 3e-1, 1e-1)}


def check_sequence_parallel(model: Molmo2, recipe: Recipe, mesh: Mesh, device: torch.device) -> dict[str, float]:
    """Compare a pack with and without sequence parallelism; collective.

    Args:
        model: the model, which is not changed; each rank copies it to `device` in the dtype of the run.
        recipe: the run.
        mesh: this rank's place.
        device: where the pack is computed.

    Returns:
        Relative differences of the loss ("loss") and of the gradient of every parameter, by name, the largest of all
        ranks; empty where no ranks share a pack.

    Raises:
        MeshError: a difference is larger than rounding; raised on every rank.
    """
    if mesh.sp_group is None:
        return {}
    train, tolerance = recipe.train, TOLERANCES[recipe.train.precision]
    weights = {name: value.to(device, DTYPES[train.precision], copy=True) for name, value in model.state_dict().items()}
    copy = Molmo2.with_weights(model.config, weights).train()
    copy.set_recompute(train.recompute, train.chunk_crops, "activations" in train.offload)
    length = check_length(recipe.data.sequence_length, train.sp)
    batch = check_pack(model.config, length, recipe.data.max_crops)
    loss = _backward(TrainingModule(copy, recipe, SINGLE), batch, device)
    alone = {}
    for name, parameter in copy.named_parameters():
        alone[name] = torch.zeros_like(parameter, device="cpu") if parameter.grad is None else parameter.grad.cpu()
        parameter.grad = None
    shared_loss = _backward(TrainingModule(copy, recipe, mesh), own_crops(batch, mesh.sp_rank, mesh.sp), device)
    dist.all_reduce(shared_loss)
    shared_loss /= mesh.dp  # all groups ran the same pack
    floors = _floors(copy, alone, tolerance.floor)
    differences = {"loss": (shared_loss - loss).abs() / loss.abs()}
    for name, parameter in copy.named_parameters():
        reference = alone.pop(name).to(device).float()
        if parameter.grad is not None:
            mean = parameter.grad.float()
        else:  # one rank lacks what another has: ZeRO's collectives would hang, so no tolerance may accept it
            mean = torch.full_like(reference, torch.nan if reference.any() else 0)
        dist.all_reduce(mean)
        mean /= mesh.world * mesh.dp  # the mean over ranks, as DeepSpeed takes it, and over equal groups
        differences[name] = (mean - reference).norm() / torch.clamp(reference.norm(), min=floors[name])
        parameter.grad = None
    largest = torch.stack([value.float() for value in differences.values()]).nan_to_num(nan=torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found = dict(zip(differences, largest.tolist(), strict=True))
    _refuse(found, tolerance, f"a pack of {length} tokens in {train.precision} differs with train.sp {mesh.sp}")
    return found


def check_length(sequence_length: int, sp: int) -> int:
    """Tokens of the pack to check: the run's own number up to `WHOLE`, of longer ones a quarter, but `WHOLE` at least.

    Both are on the same side of `SHORT` as the run's own, so that the same attention backend is taken.
    """
    whole = min(sequence_length, WHOLE) // sp * sp
    return max(whole, sequence_length // 4 // (sp * BLOCK) * (sp * BLOCK))


def _backward(module: TrainingModule, batch: Batch, device: torch.device) -> Tensor:
    """Run a pack forward and backward; its local loss, float64."""
    loss, logged = module(module.place(batch, device))
    loss.backward()
    return (logged.cross_entropy + logged.z).double()


def _floors(model: Molmo2, gradients: dict[str, Tensor], floor: float) -> dict[str, float]:
    """For each parameter the norm below which its gradient counts as zero; see `Tolerance`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    floors = {}
    for group in model.parameter_groups().values():
        members = [names[id(parameter)] for parameter in group]
        square = sum(float(gradients[name].float().norm()) ** 2 for name in members)
        size = sum(gradients[name].numel() for name in members)
        for name in members:
            floors[name] = max(TINY, floor * (square / size * gradients[name].numel()) ** 0.5)
    return floors


def _refuse(found: dict[str, float], tolerance: Tolerance, what: str) -> None:
    """Raise a MeshError that names the worst differences, if any is larger than rounding."""
    limits = {name: tolerance.loss if name == "loss" else tolerance.gradient for name in found}
    excess = sorted((name for name in found if not found[name] <= limits[name]), key=lambda name: -found[name])
    if excess:
        listed = ", ".join(f"{name} {found[name]:.2g}" for name in excess[:NAMED])
        raise MeshError(
            f"{what} from the same on one rank, by more than rounding ({tolerance.loss:g} of the loss, "
            f"{tolerance.gradient:g} of a gradient), in {len(excess)} of {len(found)} values: {listed}; "
            "set train.sp=1, or find which of torch, the driver and the communication library changed"
        )


def check_pack(config: ModelConfig, length: int, max_crops: int) -> Batch:
    """A random pack with images, frames, two branches, a second member of text, and padding; the same on every rank.

    Half of its tokens are visual, or as many as `max_crops` allows; text and with it the loss is at the end.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, patches = config.text.vocab_size, config.patches_per_crop
    num_tokens = max(1, patches // config.video_pool**2)  # pooled tokens of each visual
    visual = [vocabulary, *[config.image_patch_id] * num_tokens, vocabulary + 1]
    count = max(1, min(length // 2 // len(visual), max_crops // 2))
    crops = torch.tensor([1 if number % 4 else IMAGE_CROPS for number in range(count)])
    trunk = visual * count
    branch = (length - len(trunk)) // 4
    sizes = {1: branch, 2: branch, MEMBER: branch}
    segments = [TRUNK] * len(trunk) + [
        number + (TRUNK if number == MEMBER else 0) for number, size in sizes.items() for _ in range(size)
    ]
    positions = list(range(len(trunk)))
    for number, size in sizes.items():
        first = 0 if number == MEMBER else len(trunk)
        positions += range(first, first + size)
    text = torch.randint(0, vocabulary, (2, length), generator=generator)
    input_ids = text[:1].clone()
    input_ids[0, : len(trunk)] = torch.tensor(trunk)
    segment_ids = torch.full((1, length), PAD_SEGMENT, dtype=torch.int32)
    segment_ids[0, : len(segments)] = torch.tensor(segments, dtype=torch.int32)
    position_ids = torch.zeros(1, length, dtype=torch.int64)
    position_ids[0, : len(positions)] = torch.tensor(positions)
    is_text = (segment_ids != TRUNK) & (segment_ids != PAD_SEGMENT)
    weights = torch.rand(1, length, generator=generator) * is_text
    ends, width = crops.cumsum(0).tolist(), config.video_pool**2
    windows = [
        torch.randint(patches * (end - size), patches * end, (num_tokens, width), generator=generator)
        for end, size in zip(ends, crops.tolist(), strict=True)
    ]
    return Batch(
        input_ids=input_ids,
        labels=text[1:],
        loss_weights=weights,
        position_ids=position_ids,
        segment_ids=segment_ids,
        is_visual=input_ids >= vocabulary,
        dataset_ids=torch.zeros(1, length, dtype=torch.int64),
        pixels=torch.randint(
            0, 256, (int(crops.sum()), config.crop_size, config.crop_size, 3), generator=generator, dtype=torch.uint8
        ),
        pooling=torch.cat(windows),
        visual_crops=crops,
        visual_tokens=torch.full((count,), num_tokens),
        step=0,
        slots=(0,),
        divisor=float(weights.sum()),
        cursor=Cursor(step=0, window=0, offset=0),
        masked=(),
    )
