"""One training step as a module, and the DeepSpeed engine around it, both derived from the recipe.

Sequence parallelism is invisible to DeepSpeed: it gets no `mpu` and sees plain data parallelism over all ranks, whose
gradient is the mean over ranks in every ZeRO stage. So each rank returns world * (its sum) / W, with W the loss weight
of the whole step, and gradients are exact for any dp, sp, micro-batch and stage. Clipping and schedules are in
`molmo2.training.optim`; saving is in `molmo2.checkpoint.files`.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from molmo2.config import COMPONENTS, Recipe
from molmo2.model.attention import masked_attention
from molmo2.model.dropout import Dropout, seed_words
from molmo2.model.loss import LossSums, chunk_sums, rows_per_chunk, weighted_loss
from molmo2.model.mask import AttentionMask
from molmo2.model.molmo2 import Molmo2
from molmo2.parallel.gather import take_loss_rows
from molmo2.parallel.mesh import Mesh, MeshError
from molmo2.parallel.places import PlacedBatch, place_batch
from molmo2.parallel.ulysses import ulysses
from molmo2.parallel.vision import encode_shared
from molmo2.training.optim import ComponentAdamW, parameter_groups
from shards.stream.collate import Batch

PAD_CROPS = 8  # on a GPU crops are padded to a multiple: a chunk of up to 32 then has one of four shapes
# The DeepSpeed keys that a user may set: they neither change what is computed nor contradict the recipe.
ENGINE_KEYS = frozenset({"aio", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown"})
ZERO_KEYS = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "zero_hpz_partition_size",
    }
)


class TrainingModule(nn.Module):
    """The model and its loss, as the one module that DeepSpeed wraps.

    Args:
        model: the model; its parameters have the prefix "model." in a checkpoint.
        recipe: the run.
        mesh: this rank's place.
    """

    def __init__(self, model: Molmo2, recipe: Recipe, mesh: Mesh) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
        self.train_settings = recipe.train
        self.chunk_rows = rows_per_chunk(model.config.text.vocab_size, model.lm_head.chunk_sums is not chunk_sums)
        self.attend = ulysses(masked_attention, mesh, model.config.text.num_heads, model.config.text.num_kv_heads)

    def place(self, batch: Batch, device: torch.device | str = "cpu") -> PlacedBatch:
        """Find what this rank does with a batch in host memory, and copy it to a device."""
        seeds = seed_words((self.train_settings.seed, batch.step, slot) for slot in batch.slots)
        place = functools.partial(place_batch, mesh=self.mesh, patches_per_crop=self.model.config.patches_per_crop)
        if not self.train_settings.visual_first:
            return place(batch, device=device, seeds=seeds)
        from molmo2.parallel.visual_first import visual_first

        batch, order = visual_first(batch)
        return place(batch, device=device, seeds=seeds)._replace(order=order.to(device))

    def forward(self, placed: PlacedBatch, num_datasets: int = 1) -> tuple[Tensor, LossSums]:
        """Compute the loss of one micro-batch; all ranks must call it together. It never waits for the device.

        Args:
            placed: the micro-batch; its dataset ids are below `num_datasets`.
            num_datasets: number of datasets with sums of their own.

        Returns:
            The loss for backward (scalar: world * local sum / W), and the local sums for the log, detached; in them
            `cross_entropy` and `z` are divided by W.
        """
        model, mesh, batch, rows = self.model, self.mesh, placed.batch, placed.loss
        crop_size = model.config.crop_size
        features, touch = encode_shared(model.encode_visuals, batch.pixels, placed.visual, crop_size, mesh)
        length = batch.input_ids.shape[1] // mesh.sp
        own = slice(mesh.sp_rank * length, (mesh.sp_rank + 1) * length)
        # After the sum x is a tensor of its own, no view: a compiled layer sees the same kind of input in every layer.
        x = model.embed(batch.input_ids, features)[:, own] + touch
        mask = AttentionMask(batch.segment_ids, batch.is_visual, placed.order)
        dropout = self._dropout(placed, own)
        hidden = model.decode(x, batch.position_ids[:, own], mask, attend=self.attend, dropout=dropout)
        loss_of = functools.partial(
            weighted_loss,
            labels=rows.labels,
            weights=rows.weights,
            z_loss=self.train_settings.z_loss,
            chunk_rows=self.chunk_rows,
            sums_of=model.lm_head.chunk_sums,
            datasets=rows.datasets,
            num_datasets=num_datasets,
        )
        sums = model.lm_head(take_loss_rows(hidden, rows, mesh), loss_of)
        both = torch.stack([sums.cross_entropy, sums.z]) / batch.divisor
        logged = both.detach()
        return both.sum() * mesh.world, sums._replace(cross_entropy=logged[0], z=logged[1])

    def _dropout(self, placed: PlacedBatch, own: slice) -> Dropout | None:
        settings, weights = self.train_settings, placed.batch.loss_weights
        if not (self.training and settings.residual_dropout):
            return None
        hit = torch.ones_like(weights) if settings.dropout_on == "all" else weights > 0
        return Dropout(rates=hit[:, own] * settings.residual_dropout, seeds=placed.seeds, start=own.start)


def start_distributed() -> torch.device:
    """Join the process group (gloo on CPU, nccl on CUDA) and return this rank's device.

    It works under deepspeed, torchrun and accelerate, which set the environment variables of the ranks, under srun, and
    without a launcher, on one rank.

    Raises:
        MeshError: srun started several tasks, and MASTER_ADDR is not set.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _take_rank_from_slurm()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        from molmo2.parallel.cpu_collectives import join_on_cpu

        join_on_cpu()
    else:
        let_segments_grow()
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed(verbose=False)
    return torch.device(accelerator.current_device_name())


def let_segments_grow() -> None:
    """Make the GPU's allocator extend its segments, unless the environment configures it; before the first use of CUDA.

    Packs differ in their numbers of crops and of rows with loss, which leaves segments of fixed sizes in pieces.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _take_rank_from_slurm() -> None:
    """Set the variables of a rank from those that srun gives to a task; `deepspeed --launcher slurm` sets no others."""
    variables = os.environ
    if "MASTER_ADDR" not in variables:
        raise MeshError(
            f"srun started {variables['SLURM_STEP_NUM_TASKS']} tasks, and MASTER_ADDR is not set, so that they cannot "
            "meet; export MASTER_ADDR (the first node, where task 0 runs) and MASTER_PORT, or use "
            "recipes/launch/train.slurm, which does"
        )
    variables.setdefault("MASTER_PORT", "29500")
    variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
    variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]


def read_engine_keys(path: Path | None) -> dict[str, Any]:
    """Read a user's additions to DeepSpeed's JSON (`--deepspeed_config`): only buffers, prefetching and profiling.

    Raises:
        ValueError: the file holds no JSON object, or keys that the recipe sets or that change what is computed.
    """
    if path is None:
        return {}
    added = json.loads(path.read_text())
    if not isinstance(added, dict) or not isinstance(added.get("zero_optimization", {}), dict):
        raise ValueError(f"{path}: write a JSON object, with an object in zero_optimization")
    refused = [name for name in added if name not in ENGINE_KEYS | {"zero_optimization"}]
    refused += [f"zero_optimization.{name}" for name in added.get("zero_optimization", {}) if name not in ZERO_KEYS]
    if refused:
        raise ValueError(
            f"{path}: {', '.join(refused)}: the recipe decides that, or it changes what is computed; allowed: "
            f"{', '.join(sorted(ENGINE_KEYS))}, and of zero_optimization {', '.join(sorted(ZERO_KEYS))}"
        )
    return added


def deepspeed_config(
    recipe: Recipe, universal: bool = False, added: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the recipe. `added`: see `read_engine_keys`.

    Of the batch sizes it gets only the micro-batch, since the trainer does gradient accumulation itself.
    """
    train = recipe.train
    half = train.precision == "bf16"
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if "optimizer" in train.offload else {}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "managed_gradient_accumulation": False,  # the trainer calls backward for every micro-batch, then step
        "gradient_clipping": 0.0,  # explicit, since its default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # `ComponentAdamW` runs on the CPU too
        "zero_optimization": {
            "stage": train.zero_stage,
            **offload,
            "overlap_comm": train.overlaps_reduction,
            # One sub-group for each component: ZeRO-3 steps one sub-group at a time, and clipping needs the norm of
            # the component's whole gradient.
            "sub_group_size": 10**12,
            **added.get("zero_optimization", {}),
        },
        # At stage 0 DeepSpeed has no reader of the universal format: `molmo2.checkpoint.reshard.load_whole` is one.
        "checkpoint": {"tag_validation": "Ignore", "load_universal": universal and train.zero_stage > 0},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    if half:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config | {name: value for name, value in added.items() if name != "zero_optimization"}


def start_engine(
    model: Molmo2, recipe: Recipe, mesh: Mesh, universal: bool = False, added: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Any, ComponentAdamW, list[str]]:
    """Freeze the parameters that the recipe freezes, and wrap model and optimizer in an engine; collective.

    `universal`: the engine will load a checkpoint in DeepSpeed's universal format. `added`: see `read_engine_keys`.

    Returns:
        The engine, the optimizer inside it, and the names of its groups in order.
    """
    if recipe.optim.lora is not None:
        from molmo2.model.lora import add_adapters

        add_adapters(model, recipe.optim.lora.rank, recipe.optim.lora.alpha, recipe.train.seed)
    train = recipe.train
    model.freeze(train.freeze, recipe.optim.freeze_base_embedding)  # after LoRA, which trains the added embeddings
    model.set_recompute(train.recompute, train.chunk_crops, "activations" in train.offload)
    on_gpu = get_accelerator().device_name() == "cuda"
    if on_gpu:
        model.vit.pad_crops = PAD_CROPS
    if train.fp8:
        from molmo2.model.fp8 import use_fp8

        use_fp8(model, torch.device("cuda" if on_gpu else "cpu"))
    if train.compiles(on_gpu):
        from molmo2.model.regions import compile_regions

        compile_regions(model, budget=train.activation_budget)
    components = model.parameter_groups()
    assert set(components) == set(COMPONENTS)
    optimizer = ComponentAdamW(
        parameter_groups(components, recipe.optim),
        partitioned=recipe.train.zero_stage > 0,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        weight_decay=recipe.optim.weight_decay,
        fused=on_gpu and "optimizer" not in recipe.train.offload,
    )
    names = [group["name"] for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(
        model=TrainingModule(model, recipe, mesh),
        optimizer=optimizer,
        config=deepspeed_config(recipe, universal, added),
    )
    engine.train()
    return engine, optimizer, names
