"""Forward and backward of our model beside transformers' Molmo2: same weights, same batch, same loss.

    python benchmarks/bench_model.py                                    a few minutes on a CPU; on a GPU that, and more
    python benchmarks/bench_model.py --sizes tiny --rounds 3            seconds
    python benchmarks/bench_model.py --sizes --presets nano             a GPU's figures of one preset

On the CPU, float32: transformers' eager and SDPA attention beside ours. Every round runs each of them once, in turning
order, and a ratio is the median over rounds of ours / theirs, so that other work on the machine hits both. All compute
the logits of every token ("ours"); the line "as trained" computes those of tokens with loss only, as the trainer does.
The batch is a video, questions about it as branches, and text packed behind it. In their favour, transformers gets
normalised patches and the 4-D mask ready-made, while ours makes both in each step.

On a GPU, bfloat16 with activation checkpointing: time, peak memory and MFU of a step as trained, for the presets, in
rows of 4,096 / 16,384 / 36,864 tokens with 0 / 128 / 384 crops where they fit (a frame takes 88 tokens). MFU counts the
operations of `molmo2.model.flops`, three times the forward pass, against the GPU's dense bfloat16 peak; the components
are timed by themselves, too. transformers runs beside it where it does not run out of memory.

torch is enough to run this; without transformers its columns are absent. Nothing is written. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2.model.flops import TRAINING_FACTOR, Flops, Workload, forward_flops, known_peak
from molmo2.model.loss import rows_per_chunk, weighted_loss
from molmo2.model.mask import MEMBER, TRUNK, AttentionMask, allowed
from molmo2.model.molmo2 import Molmo2
from molmo2.model.pairs import attention_pairs
from molmo2.model.presets import PRESETS, ConnectorConfig, ModelConfig, TextConfig, VitConfig
from molmo2.model.vit import to_patches

STAMP = 5  # tokens of a frame's time
IGNORED = -100
EQUAL = 1e-4  # largest relative difference of two losses that count as the same
MFU_BAR, RATIO_BAR = 0.4, 1.0


def _size(name: str, vision: int, text: int, layers: int, vocabulary: int) -> ModelConfig:
    """A model of Molmo2's proportions, for a CPU."""
    return ModelConfig(
        name=name,
        vit=VitConfig(
            hidden_size=vision,
            intermediate_size=3 * vision,
            num_layers=layers,
            num_heads=vision // 64,
            feature_layers=(layers - 1, layers // 2),
        ),
        connector=ConnectorConfig(hidden_size=vision, num_heads=vision // 64, intermediate_size=3 * text),
        text=TextConfig(
            hidden_size=text,
            intermediate_size=3 * text,
            num_layers=layers,
            num_heads=text // 64,
            num_kv_heads=text // 128,
            head_dim=64,
            vocab_size=vocabulary,
        ),
    )


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a row of so many tokens, so many of whose frames are crops."""

    config: ModelConfig
    num_tokens: int
    num_crops: int


SIZES = {
    "tiny": Case(PRESETS["tiny"], 1024, 32),
    "small": Case(_size("small", 192, 256, 6, 8_192), 1024, 4),
    "mid": Case(_size("mid", 384, 512, 8, 32_768), 1024, 4),
}
LENGTHS, CROPS = (4_096, 16_384, 36_864), (0, 128, 384)


# --- the batch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row; `labels` already shifted, `IGNORED` where there is no loss. Names as in the loader's batch."""

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    is_visual: Tensor
    pixels: Tensor
    pooling: Tensor
    labels: Tensor


def frame_pooling(config: ModelConfig) -> Tensor:
    """Windows of one frame's patches, int64 [tokens, pool * pool], -1 where a window leaves the frame."""
    grid, pool = config.crop_size // config.patch_size, config.video_pool
    missing = -grid % pool
    border = (missing // 2, missing - missing // 2)
    index = F.pad(torch.arange(grid * grid).view(grid, grid), (*border, *border), value=-1)
    return index.unfold(0, pool, pool).unfold(1, pool, pool).reshape(-1, pool * pool)


def make_batch(case: Case, device: torch.device) -> Batch:
    """A video with three questions, and packed texts of up to 1,024 tokens, half of them with loss."""
    config, vocabulary = case.config, case.config.text.vocab_size
    generator = torch.Generator().manual_seed(0)
    window = frame_pooling(config)
    patch, start, end = vocabulary + 2, vocabulary + 7, vocabulary + 8
    frame = torch.tensor([0] * STAMP + [start] + [patch] * len(window) + [end])
    trunks, branches = [], []
    left = case.num_tokens
    if case.num_crops:
        trunks.append(torch.cat([torch.zeros(1, dtype=torch.int64), frame.repeat(case.num_crops)]))
        left -= len(trunks[0])
        branches.append([min(100, left // 4)] * 3)
        left -= sum(branches[0])
    while left:
        length = min(1024, left)
        trunks.append(torch.zeros(length - length // 2, dtype=torch.int64))
        branches.append([length // 2])
        left -= length
    positions: list[int] = []
    ids, segments, labelled = [], [], []
    for member, (trunk, lengths) in enumerate(zip(trunks, branches, strict=True)):
        ids += [trunk, torch.zeros(sum(lengths), dtype=torch.int64)]
        for branch, length in ((TRUNK, len(trunk)), *enumerate(lengths, 1)):
            segments += [member * MEMBER + branch] * length
            positions += range(length) if branch == TRUNK else range(len(trunk), len(trunk) + length)
            labelled += [branch != TRUNK] * length
    input_ids = torch.cat(ids)
    text = torch.randint(vocabulary, input_ids.shape, generator=generator)
    input_ids = torch.where(input_ids == 0, text, input_ids)
    labels = torch.randint(vocabulary, input_ids.shape, generator=generator)
    side, patches = config.crop_size, config.patches_per_crop
    offsets = torch.arange(case.num_crops)[:, None, None] * patches
    pooling = torch.where(window >= 0, window + offsets, -1).flatten(0, 1)
    pixels = torch.randint(256, (case.num_crops, side, side, 3), generator=generator, dtype=torch.uint8)
    batch = Batch(
        input_ids=input_ids[None],
        position_ids=torch.tensor([positions]),
        segment_ids=torch.tensor([segments], dtype=torch.int32),
        is_visual=(input_ids[None] >= vocabulary),
        pixels=pixels,
        pooling=pooling,
        labels=torch.where(torch.tensor(labelled), labels, IGNORED)[None],
    )
    return Batch(**{name: getattr(batch, name).to(device) for name in Batch.__slots__})


def workload(batch: Batch) -> Workload:
    """What the batch asks of a model that computes logits where there is loss."""
    return Workload(
        num_crops=len(batch.pixels),
        num_visual_tokens=len(batch.pooling),
        pool_width=batch.pooling.shape[1],
        num_tokens=batch.input_ids.numel(),
        num_pairs=attention_pairs(batch.segment_ids, batch.is_visual),
        num_logits=int((batch.labels != IGNORED).sum()),
    )


# --- steps -----------------------------------------------------------------------------------------------------------

Loss = Callable[[], Tensor]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens, in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def our_loss(model: Molmo2, batch: Batch) -> Tensor:
    """Logits of every token."""
    inputs = (getattr(batch, name) for name in Batch.__slots__ if name != "labels")
    return mean_loss(model(*inputs), batch.labels)


def trained_loss(model: Molmo2, batch: Batch) -> Tensor:
    """As the trainer does it: logits of the labelled tokens only."""
    features = model.encode_visuals(batch.pixels, batch.pooling) if len(batch.pixels) else None
    return text_loss(model, batch, features)


def text_loss(model: Molmo2, batch: Batch, features: Tensor | None) -> Tensor:
    """The language model's part of `trained_loss`."""
    mask = AttentionMask(batch.segment_ids, batch.is_visual)
    hidden = model.decode(model.embed(batch.input_ids, features), batch.position_ids, mask)
    kept = batch.labels != IGNORED
    labels, rows = batch.labels[kept], rows_per_chunk(model.config.text.vocab_size)
    sums = weighted_loss(
        hidden[kept], model.lm_head, labels=labels, weights=torch.ones_like(labels, dtype=torch.float32),
        z_loss=0.0, chunk_rows=rows, sums_of=model.lm_head.chunk_sums,
    )  # fmt: skip
    return sums.cross_entropy / len(labels)


def their_loss(reference: Any, config: ModelConfig, batch: Batch) -> Loss:
    """transformers' step; patches and mask are made here, outside the step."""
    dtype = next(reference.parameters()).dtype
    seen = allowed(batch.segment_ids, batch.is_visual)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "mm_token_type_ids": batch.is_visual.long(),
        "attention_mask": torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
            ~seen, torch.finfo(dtype).min
        ),
        "use_cache": False,
    }
    if len(batch.pixels):
        side = -(-(config.crop_size // config.patch_size) // config.video_pool)
        inputs |= {
            "pixel_values_videos": to_patches(batch.pixels, config.patch_size).to(dtype),
            "video_token_pooling": batch.pooling,
            "video_grids": torch.tensor([[len(batch.pixels), side, side]], device=batch.pixels.device),
        }
    return lambda: mean_loss(reference(**inputs).logits, batch.labels)


def make_ours(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Molmo2:
    """Our model with random weights, norms and biases included."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Molmo2(config).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and not name.endswith("bias") else 0.0, 0.02)
    return model.train()


def make_theirs(model: Molmo2, attention: str) -> Any:
    """transformers' Molmo2 with the weights of ours."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    from molmo2.weights.names import from_foreign, hub_config

    weight = model.lm_head.weight
    with torch.device(weight.device):
        reference = Molmo2ForConditionalGeneration._from_config(
            Molmo2Config(**hub_config(model.config)), attn_implementation=attention, dtype=weight.dtype
        )
    state = model.state_dict()
    theirs = {name: p.detach() for name, p in reference.named_parameters()}
    views = from_foreign({name: tensor.shape for name, tensor in state.items()}, theirs)
    for name, view in views.items():  # parts of their own tensors, so this writes into their model
        view().copy_(state[name])
    return reference.train()


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_step(loss_of: Loss) -> tuple[float, float]:
    """Seconds and loss of one forward and backward pass."""
    synchronize()
    since = time.perf_counter()
    loss = loss_of()
    loss.backward()
    synchronize()
    return time.perf_counter() - since, loss.item()


def rounds_of(steps: dict[str, tuple[torch.nn.Module, Loss]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one that does not count; all must give one loss.

    Raises:
        SystemExit: two losses differ.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    names = list(steps)
    for number in range(num_rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            model, loss_of = steps[name]
            model.zero_grad(set_to_none=True)
            taken, losses[name] = run_step(loss_of)
            seconds[name] += [taken] if number else []
        if max(losses.values()) - min(losses.values()) > EQUAL * max(losses.values()):
            raise SystemExit(f"losses differ, so the steps are not the same work: {losses}")
    return seconds


# --- CPU -------------------------------------------------------------------------------------------------------------


def measure_cpu(name: str, num_rounds: int) -> dict[str, Any]:
    """Prints a table; returns the ratios by bar."""
    case, device = SIZES[name], torch.device("cpu")
    model = make_ours(case.config, device, torch.float32)
    batch = make_batch(case, device)
    steps: dict[str, tuple[torch.nn.Module, Loss]] = {
        "ours": (model, functools.partial(our_loss, model, batch)),
        "ours, as trained": (model, functools.partial(trained_loss, model, batch)),
    }
    for attention in ("eager", "sdpa") if find_spec("transformers") else ():
        reference = make_theirs(model, attention)
        steps[f"transformers {attention}"] = (reference, their_loss(reference, case.config, batch))
    seconds = rounds_of(steps, num_rounds)
    count = sum(parameter.numel() for parameter in model.parameters())
    teraflops = TRAINING_FACTOR * forward_flops(case.config, workload(batch)).total / 1e12
    print(
        f"\n{name}: {count / 1e6:,.1f} M parameters, {case.num_tokens} tokens, {case.num_crops} crops, "
        f"{teraflops:.3f} TFLOP a step as trained, {num_rounds} rounds, {torch.get_num_threads()} threads, float32"
    )
    print(f"  {'':22s}{'best, s':>10s}{'median, s':>11s}{'ours / it':>11s}")
    bars: dict[str, Any] = {}
    for step, times in seconds.items():
        ratio = statistics.median(ours / own for ours, own in zip(seconds["ours"], times, strict=True))
        print(f"  {step:22s}{min(times):>10.4f}{statistics.median(times):>11.4f}{ratio:>11.3f}")
        if step.startswith("transformers"):
            bars[f"cpu_ratio_{step.split()[1]}_{name}"] = bar(ratio, RATIO_BAR, ratio <= RATIO_BAR)
    return bars


def bar(value: float, target: float, ok: bool) -> dict[str, Any]:
    """A figure with what it has to reach."""
    return {"value": round(value, 4), "bar": target, "ok": bool(ok)}


# --- GPU -------------------------------------------------------------------------------------------------------------


def fits(config: ModelConfig, num_tokens: int, num_crops: int) -> bool:
    """Whether so many frames leave room for text."""
    return num_crops * (len(frame_pooling(config)) + 2 + STAMP) + 512 <= num_tokens


def component_seconds(model: Molmo2, batch: Batch, num_rounds: int) -> dict[str, float]:
    """Best time of each component's own forward and backward pass."""
    best: dict[str, float] = {}

    def time_of(name: str, loss_of: Loss) -> None:
        times = []
        for _ in range(num_rounds + 1):
            model.zero_grad(set_to_none=True)
            times.append(run_step(loss_of)[0])
        best[name] = min(times[1:])

    features = None
    if len(batch.pixels):
        with torch.no_grad():
            patches = model.vit(batch.pixels)
            features = model.connector(patches, batch.pooling)
        time_of("vit", lambda: model.vit(batch.pixels).mean())
        time_of("connector", lambda: model.connector(patches.requires_grad_(), batch.pooling).mean())
        features.requires_grad_()
    time_of("llm", lambda: text_loss(model, batch, features))
    return best


def measure_gpu(name: str, num_tokens: int, num_crops: int, num_rounds: int, peak: float | None) -> dict[str, Any]:
    """Prints a line of the table; returns the figures by bar."""
    device, case = torch.device("cuda"), Case(PRESETS[name], num_tokens, num_crops)
    model = make_ours(case.config, device, torch.bfloat16)
    model.set_recompute("full")
    batch = make_batch(case, device)
    torch.cuda.reset_peak_memory_stats()
    times = rounds_of({"ours": (model, functools.partial(trained_loss, model, batch))}, num_rounds)["ours"]
    memory = torch.cuda.max_memory_allocated() / 2**30
    parts = component_seconds(model, batch, num_rounds)
    work = forward_flops(case.config, workload(batch))
    best, key = min(times), f"{name}_{num_tokens}_{num_crops}"
    line = f"{name:6s}{num_tokens:>8,}{num_crops:>7}{best * 1e3:>11.1f}{statistics.median(times) * 1e3:>11.1f}"
    line += f"{memory:>9.1f}"
    bars: dict[str, Any] = {}
    if peak:
        mfu = share_of_peak(work, parts, best, peak)
        line += "".join(f"{mfu[part]:>11.1%}" if part in mfu else f"{'-':>11s}" for part in (*Flops.__slots__, "all"))
        if num_tokens > LENGTHS[0]:
            bars[f"mfu_{key}"] = bar(mfu["all"], MFU_BAR, mfu["all"] >= MFU_BAR)
    for attention in ("eager", "sdpa") if find_spec("transformers") else ():
        ratio = gpu_ratio(model, batch, attention, num_rounds)
        line += f"{ratio:>9.3f}" if ratio else f"{'-':>9s}"
        if ratio:
            bars[f"gpu_ratio_{attention}_{key}"] = bar(ratio, RATIO_BAR, ratio <= RATIO_BAR)
    print(line, flush=True)
    return bars


def share_of_peak(work: Flops, seconds: dict[str, float], step: float, peak: float) -> dict[str, float]:
    """MFU of the components, each in its own time, and of the whole step."""
    mfu = {part: TRAINING_FACTOR * getattr(work, part) / taken / peak for part, taken in seconds.items()}
    return mfu | {"all": TRAINING_FACTOR * work.total / step / peak}


def gpu_ratio(model: Molmo2, batch: Batch, attention: str, num_rounds: int) -> float | None:
    """Ours as trained over transformers' step, best times; None where transformers runs out of memory."""
    try:
        reference = make_theirs(model, attention)
        reference.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of = their_loss(reference, model.config, batch)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        steps: dict[str, tuple[torch.nn.Module, Callable[[], torch.Tensor]]]
        steps = {"ours": (model, functools.partial(trained_loss, model, batch)), "theirs": (reference, loss_of)}
        for _ in range(num_rounds + 1):
            for name, (module, step) in steps.items():
                module.zero_grad(set_to_none=True)
                times[name].append(run_step(step)[0])
        return min(times["ours"][1:]) / min(times["theirs"][1:])
    except torch.OutOfMemoryError:
        return None
    finally:
        loss_of = reference = steps = None  # type: ignore[assignment]
        model.zero_grad(set_to_none=True)
        free_memory()


def free_memory() -> None:
    """Give what is no longer used back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def measure_gpus(presets: list[str], num_rounds: int, peak: float | None) -> dict[str, Any]:
    """All rows of the table for this machine's GPU."""
    print(
        f"\n{torch.cuda.get_device_name()}, bfloat16, checkpointing, a step as trained; MFU against "
        f"{f'{peak / 1e12:,.0f} TFLOPS' if peak else 'no known peak (--peak-tflops)'}"
    )
    columns = "".join(f"{f'MFU {part}':>11s}" for part in (*Flops.__slots__, "all")) if peak else ""
    print(f"{'':6s}{'tokens':>8s}{'crops':>7s}{'best, ms':>11s}{'median':>11s}{'GiB':>9s}{columns}  ours / eager, sdpa")
    bars: dict[str, Any] = {}
    for name in presets:
        for num_tokens in LENGTHS:
            for num_crops in CROPS:
                if not fits(PRESETS[name], num_tokens, num_crops):
                    continue
                try:
                    bars |= measure_gpu(name, num_tokens, num_crops, num_rounds, peak)
                except torch.OutOfMemoryError:
                    print(f"{name:6s}{num_tokens:>8,}{num_crops:>7}  out of memory")
                free_memory()
    return bars


# --- the command -----------------------------------------------------------------------------------------------------


def hardware() -> str:
    """Processor and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}{gpu}"


def main() -> None:
    """Measure, print the tables, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="sizes for the CPU's tables")
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=["nano", "4b"], help="presets for a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's dense bfloat16 peak, where it is not known")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least one round must count")
    tera = arguments.peak_tflops or known_peak()
    peak = tera * 1e12 if tera else None
    bars: dict[str, Any] = {}
    for name in arguments.sizes:
        bars |= measure_cpu(name, arguments.rounds)
    if torch.cuda.is_available():
        bars |= measure_gpus(arguments.presets, arguments.rounds, peak)
    elif not find_spec("transformers"):
        print("neither a GPU nor transformers: nothing to compare with", file=sys.stderr)
    print(json.dumps({"bench": "model", "hardware": hardware(), "bars": bars}))


if __name__ == "__main__":
    main()
