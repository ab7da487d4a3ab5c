"""An estimate of what a run will need: memory of one GPU by its parts, time and cost, for several numbers of GPUs.

    python molmo2/train.py --recipe recipes/stage1.yaml --dry-run --gpu-memory 80 --gpu-price 2.5

The sizes of parameters, gradients and optimizer states follow from the ZeRO stage. Activations are measured: one layer
of the recipe's own size runs on a few tokens, and the bytes that autograd saves for backward are added up. All figures
are for full packs, so they are the most that a step takes. Time is the number of the model's operations at an assumed
utilisation of the GPU. The estimate leaves out the CUDA context, fragmentation beyond `ALLOCATOR_MARGIN`, and on the
host the processes themselves, which share most of torch's memory, and what a bucket's reader reads ahead.
"""

from __future__ import annotations

import functools
import re
import statistics
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from molmo2.config import Component, Recipe, Recompute
from molmo2.model.activations import MicroBatch, SavedBytes, activation_bytes, measure_saved
from molmo2.model.flops import PEAK_TFLOPS, Workload, known_peak, step_flops
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS, ModelConfig
from molmo2.parallel.mesh import MeshError, check_mesh
from molmo2.training.metrics import read_log
from molmo2.training.run import LOG_NAME

GIB = 2**30
LEVELS: tuple[Recompute, ...] = typing.get_args(Recompute)
BUDGETS = (0.8, 0.6, 0.4, 0.2)  # values of train.activation_budget that are tried
ALLOCATOR_MARGIN = 1.1  # fragmentation and buffers too small to model
BUCKET = 5 * 10**8  # parameters that DeepSpeed reduces or gathers at once; its default
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)  # numbers of GPUs that the table lists
MACHINE_GPUS = 8  # GPUs of one machine, at most
UTILISATION = 0.4  # the part of a GPU's peak that is assumed to be used where no run was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The GPU that an estimate is for.

    Attributes:
        memory_gib: its memory in GiB; None if it is not known.
        peak_tflops: its dense bfloat16 peak in TFLOP/s.
        price: its price for an hour in USD; None leaves out the cost.
        mfu: the MFU that a run had on it; None: `UTILISATION` is assumed.
    """

    memory_gib: float | None
    peak_tflops: float
    price: float | None = None
    mfu: float | None = None


def this_gpu(
    recipe: Recipe, memory_gib: float | None = None, price: float | None = None, measured: Path | None = None
) -> Gpu:
    """The GPU of this machine, or of `memory_gib`; where its peak is not known either, that of an H100.

    Raises:
        ValueError: the run `measured` has no log with an MFU.
    """
    if memory_gib is None and torch.cuda.is_available():
        memory_gib = torch.cuda.mem_get_info()[1] / GIB
    peak = recipe.logging.peak_tflops or known_peak() or PEAK_TFLOPS["H100"]
    mfu = None if measured is None else measured_mfu(measured)
    return Gpu(memory_gib=memory_gib, peak_tflops=peak, price=price, mfu=mfu)


def measured_mfu(run: Path) -> float:
    """The median MFU of the steps in a run's log; the first steps, which compile, do not move it.

    Raises:
        ValueError: there is no log, or no MFU in it.
    """
    path = run / LOG_NAME
    values = [line["mfu"] for line in read_log(path) if "mfu" in line]
    if not values:
        raise ValueError(
            f"{path} is missing or has no MFU; --measured takes the folder of a run on a GPU, and a GPU that is not "
            "known needs logging.peak_tflops"
        )
    return statistics.median(values)


def count_parameters(recipe: Recipe, config: ModelConfig) -> tuple[int, int]:
    """The number of parameters with the adapters of LoRA, and the number of those that are trained."""
    lora = recipe.optim.lora
    return _count_parameters(config, recipe.train.freeze, recipe.optim.freeze_base_embedding, lora.rank if lora else 0)


@functools.cache
def _count_parameters(config: ModelConfig, freeze: tuple[Component, ...], base: bool, rank: int) -> tuple[int, int]:
    with torch.device("meta"):
        model = Molmo2(config)
    adapters = 0
    if rank:
        from molmo2.model.lora import LAYERS

        linear = [module for name, module in model.text.named_modules() if re.fullmatch(LAYERS, name)]
        adapters = sum(rank * sum(module.weight.shape) for module in linear)
        for parameter in model.parameter_groups()["llm"]:
            parameter.requires_grad_(False)
    model.freeze(freeze, base)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return total + adapters, trained + adapters


@functools.cache
def _largest_parameter(config: ModelConfig) -> int:
    with torch.device("meta"):
        return max(parameter.numel() for parameter in Molmo2(config).parameters())


def state_bytes(recipe: Recipe, config: ModelConfig, world: int) -> dict[str, float]:
    """Bytes of parameters, gradients, optimizer states and DeepSpeed's buffers on one of `world` GPUs."""
    total, trained = count_parameters(recipe, config)
    half, stage = recipe.train.precision == "bf16", recipe.train.zero_stage
    buckets = 3 if recipe.train.overlaps_reduction else 2  # one is filled while another is reduced
    head = 0 if "llm" in recipe.frozen else config.text.hidden_size * config.text.vocab_size
    return {
        "parameters": total * (2 if half else 4) / (world if stage == 3 else 1),
        "gradients": trained * 4 / (world if stage >= 2 else 1),  # accumulated in float32
        "optimizer": 0.0
        if "optimizer" in recipe.train.offload
        # two moments in float32, and float32 master weights when the model is bfloat16
        else trained * (12 if half else 8) / (world if stage >= 1 else 1),
        "buckets": buckets * min(BUCKET, trained) * (2 if half else 4) if stage else 0,
        # A chunk of the loss makes a gradient of the head, which is added to that of the chunks before it.
        "head": 2 * head * (2 if half else 4),
    }


def micro_batch(recipe: Recipe) -> MicroBatch:
    """A full micro-batch of the recipe, as one GPU computes it."""
    train = recipe.train
    return MicroBatch(
        tokens=train.micro_batch * recipe.data.sequence_length / train.sp,
        crops=train.micro_batch * -(-most_crops(recipe) // train.sp),
        recompute=train.recompute,
        chunk_crops=train.chunk_crops,
        sp=train.sp,
        item_size=2 if train.precision == "bf16" else 4,
        vit_frozen="vit" in train.freeze,
        offload="activations" in train.offload,
        compiled=train.compiles(on_gpu=True),
        budget=train.activation_budget,
    )


def most_crops(recipe: Recipe) -> int:
    """The most crops in a pack: those of the recipe, and no more than its tokens hold, a frame having the fewest."""
    config, data = PRESETS[recipe.model], recipe.data
    return min(data.max_crops, data.sequence_length // (round(config.patches_per_crop**0.5) // config.video_pool) ** 2)


def memory(recipe: Recipe, world: int, kept: SavedBytes) -> dict[str, float]:
    """Peak memory of one of `world` GPUs by its parts, in bytes; the values add up to the total."""
    config = PRESETS[recipe.model]
    parts = state_bytes(recipe, config, world) | activation_bytes(config, kept, micro_batch(recipe))
    return {name: ALLOCATOR_MARGIN * value for name, value in parts.items()}


def host_memory(recipe: Recipe, world: int, kept: SavedBytes) -> dict[str, float]:
    """Memory of the first of the machines with `world` GPUs, `MACHINE_GPUS` on each, by its parts, in bytes.

    "start" is needed before the first step only, by rank 0, which reads the weights one tensor at a time, in float32
    (`molmo2.training.start`). The files are mapped; their pages, which the system drops when it needs memory, are not
    counted.
    """
    config, train, data = PRESETS[recipe.model], recipe.train, recipe.data
    _, trained = count_parameters(recipe, config)
    ranks = min(world, MACHINE_GPUS)
    batch = micro_batch(recipe)
    tokens, crops = batch.tokens, batch.crops
    activations = tokens * kept.layer_input * config.text.num_layers + crops * kept.block_input * config.vit.num_layers
    states = trained * (12 if train.precision == "bf16" else 8) / (world if train.zero_stage else 1)
    pixels = crops * config.crop_size**2 * 3  # uint8; all else in a batch is small beside them
    return {
        "start": 4.0 * _largest_parameter(config),
        "optimizer": ranks * states if "optimizer" in train.offload else 0.0,
        "activations": ranks * activations if "activations" in train.offload else 0.0,
        "batches": ranks * max(1, data.workers * data.prefetch) * pixels,
    }


def operations(recipe: Recipe) -> float:
    """Operations of a step, including recomputation; every pack is full and holds one video and one question."""
    config, data = PRESETS[recipe.model], recipe.data
    tokens, crops = data.sequence_length, most_crops(recipe)
    visual = min(tokens, crops * (round(config.patches_per_crop**0.5) // config.video_pool) ** 2)
    work = Workload(
        num_crops=crops,
        num_visual_tokens=visual,
        pool_width=config.video_pool**2,
        num_tokens=tokens,
        num_pairs=(tokens**2 + visual**2) // 2,
        num_logits=tokens - visual,
    )
    return recipe.train.packs_per_step * step_flops(config, work, recipe.frozen, recipe.train.recompute)


def suggested_changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Settings to change when the GPU is too small, the cheapest first; each item includes the changes before it.

    Returns:
        The overrides for `--set`, as text, and the recipe with them.
    """
    train = recipe.train
    savings: list[tuple[str, Any]] = [
        *(("train.recompute", level) for level in LEVELS[LEVELS.index(train.recompute) + 1 :]),
        ("train.micro_batch", 1),
        ("train.zero_stage", 3),
        *(("train.sp", sp) for sp in (2, 4, 8)),
        ("train.offload", ("activations", "optimizer")),
    ]
    overrides: list[str] = []
    for path, value in savings:
        name = path.removeprefix("train.")
        if getattr(train, name) == value or (
            name == "sp" and (train.sp >= value or recipe.data.sequence_length % value)
        ):
            continue
        train = train.model_copy(update={name: value})
        shown = f"[{','.join(value)}]" if isinstance(value, tuple) else value
        overrides = [*(text for text in overrides if not text.startswith(path)), f"{path}={shown}"]
        yield " ".join(overrides), recipe.model_copy(update={"train": train})


def dry_run(recipe: Recipe, gpu: Gpu) -> list[str]:
    """The lines to print: memory of a GPU, time and cost by number of GPUs, and what to change if it is too small.

    Raises:
        ValueError: the recipe's model is not a preset.
    """
    if recipe.model not in PRESETS:
        raise ValueError(f"model {recipe.model!r} is not a preset; known: {', '.join(sorted(PRESETS))}")
    config, train = PRESETS[recipe.model], recipe.train
    kept = measure_saved(config, torch.bfloat16 if train.precision == "bf16" else torch.float32)
    flops = operations(recipe)
    parts = list(memory(recipe, 1, kept))
    share, source = (UTILISATION, "assumed") if gpu.mfu is None else (gpu.mfu, "measured MFU")
    cost = "" if gpu.price is None else f", USD at {gpu.price:g} per GPU and hour"
    lines = [
        f"{recipe.name}: {config.name}, {train.steps:,} steps of {train.packs_per_step} packs of "
        f"{recipe.data.sequence_length:,} tokens and {recipe.data.max_crops} crops, {flops / 1e15:,.1f} PFLOP a step",
        f"GiB of one GPU in a full step, days at {share:.0%} of {gpu.peak_tflops:g} TFLOP/s ({source}){cost}",
        f"{'GPUs':>5} {'total':>7} "
        + " ".join(f"{part:>{max(7, len(part))}}" for part in parts)
        + f" {'days':>8}"
        + (f" {'USD':>10}" if cost else ""),
    ]
    totals = {}
    for world in (world for world in GPUS if _runs_on(recipe, world)):
        need = memory(recipe, world, kept)
        totals[world] = sum(need.values()) / GIB
        days = train.steps * flops / (world * gpu.peak_tflops * 1e12 * share) / 86400
        row = " ".join(f"{need[part] / GIB:>{max(7, len(part))}.1f}" for part in parts)
        paid = "" if gpu.price is None else f" {days * 24 * world * gpu.price:>10,.0f}"
        lines.append(f"{world:>5} {totals[world]:>7.1f} {row} {days:>8.2f}{paid}")
    most = max((world for world in totals if world <= MACHINE_GPUS), default=None)
    if most is not None:
        host = ", ".join(f"{part} {size / GIB:.1f}" for part, size in host_memory(recipe, most, kept).items())
        lines.append(f"GiB of the host's memory, one machine with {most} GPUs: {host}")
    if not totals:
        lines.append(f"no number of GPUs up to {GPUS[-1]} divides this recipe's packs and micro-batches")
    elif gpu.memory_gib is None:
        lines.append("no GPU was found: --gpu-memory GIB gives its memory, to see what to change if it is too small")
    else:
        lines.append(f"the least train.recompute for {gpu.memory_gib:.3g} GiB, by GPUs: {_levels(recipe, gpu, kept)}")
    if totals and gpu.memory_gib is not None and max(totals.values()) > gpu.memory_gib:
        lines += ["", *_changes(recipe, gpu.memory_gib, kept)]
    return lines


def _levels(recipe: Recipe, gpu: Gpu, kept: SavedBytes) -> str:
    """The least recomputation with which a step fits into the GPU's memory, for each number of GPUs.

    Between "none" and "light" compiled graphs can keep a part of their activations: `train.activation_budget`.
    """
    settings: dict[str, dict[str, Any]] = {level: {"recompute": level, "activation_budget": 1.0} for level in LEVELS}
    if recipe.train.compiles(on_gpu=True):
        parts = {
            f"none, activation_budget {part}": {"recompute": "none", "activation_budget": part} for part in BUDGETS
        }
        settings = {"none": settings.pop("none"), **parts, **settings}
    if "activations" in recipe.train.offload:
        settings = {"full": settings["full"]}
    chosen = []
    for world in (world for world in GPUS if _runs_on(recipe, world)):
        needs = {}
        for name, values in settings.items():
            changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})
            needs[name] = sum(memory(changed, world, kept).values()) / GIB
        fitting = (f"{name} ({need:.0f} GiB)" for name, need in needs.items() if need <= (gpu.memory_gib or 0))
        chosen.append(f"{world}: {next(fitting, 'too small')}")
    return ", ".join(chosen)


def _changes(recipe: Recipe, memory_gib: float, kept: SavedBytes) -> Iterator[str]:
    """The settings to change, each with the memory that a GPU then needs."""
    yield f"where {memory_gib:.3g} GiB are too few, --set these (GiB of one GPU, by number of GPUs):"
    for text, changed in suggested_changes(recipe):
        totals = {w: sum(memory(changed, w, kept).values()) / GIB for w in GPUS if _runs_on(changed, w)}
        yield f"  {text}: " + ", ".join(f"{world}: {total:.0f}" for world, total in totals.items())


def _runs_on(recipe: Recipe, world: int) -> bool:
    train = recipe.train
    try:
        check_mesh(
            world=world,
            sp=train.sp,
            packs_per_step=train.packs_per_step,
            micro_batch=train.micro_batch,
            num_heads=PRESETS[recipe.model].text.num_heads,
        )
    except MeshError:
        return False
    return True
