"""A check before training: one small pack must give the same loss and gradients on one rank and on a group of ranks.

    deepspeed molmo2/train.py --recipe recipes/demo/stage3.yaml --check-sp

It catches what no test on another machine can: a library whose collectives or attention kernels differ here. It
compares the loss, and the gradients of all vectors (norms, biases) of every layer, by component. Gradients of matrices
are left out, since they would take as much memory as the model. The check takes a few seconds and needs the whole
model on each rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2.config import Recipe
from molmo2.model.mask import MEMBER, PAD_SEGMENT, TRUNK
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig
from molmo2.parallel.mesh import SINGLE, Mesh, MeshError
from molmo2.training.engine import TrainingModule
from shards.stream.collate import Batch, own_crops
from shards.stream.plan import Cursor

FRAMES, TOKENS = 3, 9  # number of frames in the pack, and of visual tokens in each frame
MIN_SLICE = 16  # each rank's slice of the pack has at least this many tokens
# The largest relative difference that is accepted, for the loss and for each component's gradient. Rounding in float32
# stays far below.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_sequence_parallel(model: Molmo2, recipe: Recipe, mesh: Mesh) -> dict[str, float]:
    """Compare a small pack with and without sequence parallelism; collective.

    Returns:
        Relative differences of the loss and of each component's gradient; empty where no ranks share a pack.

    Raises:
        MeshError: a difference is larger than rounding; raised on every rank.
    """
    if mesh.sp_group is None:
        return {}
    weight = next(model.parameters())
    batch = small_pack(model.config, mesh.sp).to(weight.device)
    training = model.training
    model.train()
    alone = _loss_and_gradients(TrainingModule(model, recipe, SINGLE), batch)
    shared = _loss_and_gradients(TrainingModule(model, recipe, mesh), own_crops(batch, mesh.sp_rank, mesh.sp))
    model.train(training)
    for name, value in shared.items():
        dist.all_reduce(value)
        value /= mesh.dp  # all groups ran the same pack
        if name != "loss":
            value /= mesh.world  # the mean over ranks, as DeepSpeed takes it
    differences = {name: float((shared[name] - value).norm() / value.norm()) for name, value in alone.items()}
    limit = LIMITS[weight.dtype]
    worst = torch.tensor(list(differences.values()), device=weight.device).nan_to_num(nan=torch.inf).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if not worst <= limit:
        listed = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
        raise MeshError(
            f"a small pack differs with train.sp {mesh.sp} from the same on one rank, by more than {limit:g}: {listed} "
            "(relative); set train.sp=1, or find which of torch, the driver and the communication library changed"
        )
    return differences


def _loss_and_gradients(module: TrainingModule, batch: Batch) -> dict[str, Tensor]:
    """The local loss, and for each component the gradients of its vectors, concatenated; float32."""
    components = module.model.parameter_groups()
    vectors = {name: [p for p in group if p.requires_grad and p.ndim == 1] for name, group in components.items()}
    loss, logged = module(batch)
    flat = [parameter for group in vectors.values() for parameter in group]
    gradients = iter(torch.autograd.grad(loss, flat))
    joined = {name: torch.cat([next(gradients).float() for _ in group]) for name, group in vectors.items() if group}
    return {"loss": logged.cross_entropy + logged.z, **joined}


def small_pack(config: ModelConfig, sp: int) -> Batch:
    """A random pack with frames, two branches, a second member of text, and padding; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, patches = config.text.vocab_size, config.patches_per_crop
    frame = [vocabulary, *[config.image_patch_id] * TOKENS, vocabulary + 1]
    length = sp * max(MIN_SLICE, -(-2 * FRAMES * len(frame) // sp))
    trunk = frame * FRAMES
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
    windows = torch.randint(0, patches, (FRAMES, TOKENS, config.video_pool**2), generator=generator)
    return Batch(
        input_ids=input_ids,
        labels=text[1:],
        loss_weights=weights,
        position_ids=position_ids,
        segment_ids=segment_ids,
        is_visual=input_ids >= vocabulary,
        dataset_ids=torch.zeros(1, length, dtype=torch.int64),
        pixels=torch.randint(
            0, 256, (FRAMES, config.crop_size, config.crop_size, 3), generator=generator, dtype=torch.uint8
        ),
        pooling=(windows + patches * torch.arange(FRAMES)[:, None, None]).flatten(0, 1),
        visual_crops=torch.ones(FRAMES, dtype=torch.int64),
        visual_tokens=torch.full((FRAMES,), TOKENS),
        step=0,
        slots=(0,),
        divisor=float(weights.sum()),
        cursor=Cursor(step=0, window=0, offset=0),
        masked=(),
    )
