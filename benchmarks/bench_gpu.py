"""The benchmark that decides how the model runs on a GPU: one JSON line for each figure, written as it is measured.

    PYTHONPATH=. python benchmarks/bench_gpu.py --part attention      torch and the model alone
    PYTHONPATH=. python benchmarks/bench_gpu.py --part step           the same
    PYTHONPATH=. python benchmarks/bench_gpu.py --part train          needs all that training needs
    PYTHONPATH=. python benchmarks/bench_gpu.py --device cpu          every part on tiny, about a minute

A part stops beginning new figures after `--seconds`. A figure that fails is a line too, with its error, and the exit
code is then 1. docs/gpu.md says what each figure decides.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from bench_model import (
    Batch,
    Case,
    component_seconds,
    fits,
    hardware,
    make_batch,
    make_ours,
    make_theirs,
    run_step,
    share_of_peak,
    their_loss,
    trained_loss,
    workload,
)
from torch import Tensor

from molmo2.model.activations import MicroBatch, activation_bytes, measure_saved
from molmo2.model.attention import dense_attention, tiled_attention
from molmo2.model.connector import Connector
from molmo2.model.flex import flex, has_triton, kernel_options
from molmo2.model.flops import TRAINING_FACTOR, forward_flops, known_peak
from molmo2.model.fp8 import use_fp8
from molmo2.model.mask import MEMBER, TRUNK, AttentionMask
from molmo2.model.pairs import attention_pairs
from molmo2.model.presets import PRESETS, ModelConfig
from molmo2.model.regions import compile_regions
from molmo2.model.visual_order import visual_first_order

GIB = 2**30
CHUNK_CROPS = 32  # as in a run: `molmo2.config.CHUNK_CROPS`
ROUNDS = 3  # the best of so many counts, after one that is reported as the first


@dataclass
class Bench:
    """The device, the time that is left, and the lines that were written."""

    device: torch.device
    seconds: float
    since: float = field(default_factory=time.monotonic)
    part: str = ""
    failed: int = 0

    @property
    def tiny(self) -> bool:
        """Whether everything is measured at its smallest size."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.float32 if self.tiny else torch.bfloat16

    def write(self, figure: str, **values: Any) -> None:
        """One line, at once."""
        rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in values.items()}
        print(json.dumps({"part": self.part, "figure": figure, **rounded}), flush=True)

    @contextmanager
    def figure(self, figure: str, **case: Any) -> Iterator[dict[str, Any]]:
        """A figure whose values are put into the dict; an error becomes its line, and the next is measured."""
        values: dict[str, Any] = {}
        try:
            yield values
        except Exception as error:  # one figure must not lose the others
            text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            self.failed += not isinstance(error, torch.OutOfMemoryError)
            values["error"] = text[:500]
        self.write(figure, **case, **values)
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def over(self) -> bool:
        """Whether the time is up; says so once."""
        if time.monotonic() - self.since < self.seconds:
            return False
        self.write("cut", seconds=self.seconds)
        return True

    def reset_peak(self) -> None:
        """Begin to measure peak memory."""
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Peak memory in GiB; None on a CPU."""
        return None if self.tiny else torch.cuda.max_memory_allocated() / GIB

    def timed(self, run: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
        """Seconds of the first call, and the best of the others."""
        times = []
        for _ in range(rounds + 1):
            self.synchronize()
            since = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - since)
        return times[0], min(times[1:])

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.tiny:
            torch.cuda.synchronize()


# --- attention -------------------------------------------------------------------------------------------------------


def layout(kind: str, length: int) -> tuple[Tensor, Tensor]:
    """`segment_ids` int32 [1, S] and `is_visual` bool [1, S] of a row: packed texts, a video, or many branches."""
    segments, visual = torch.empty(length, dtype=torch.int32), torch.zeros(length, dtype=torch.bool)
    if kind == "packed":  # texts of 64 to 1,024 tokens
        sizes: list[int] = []
        generator = torch.Generator().manual_seed(length)
        while sum(sizes) < length:
            sizes.append(int(torch.randint(64, 1025, (), generator=generator)))
        members = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:length]
        segments[:] = members * MEMBER + TRUNK
    else:
        trunk = length * 7 // 8 if kind == "video" else length // 4
        branches = 3 if kind == "video" else 32
        segments[:trunk] = TRUNK
        visual[:trunk] = torch.arange(trunk) % 88 >= 6  # a frame: its time, a start token, patches, an end token
        segments[trunk:] = 1 + torch.arange(length - trunk) * branches // (length - trunk)
    return segments[None], visual[None]


class Row:
    """Queries, keys, values, the gradient of the result, and the mask; `ordered`: visual tokens come first."""

    def __init__(
        self, bench: Bench, kind: str, length: int, dtype: torch.dtype | None = None, ordered: bool = False
    ) -> None:
        self.heads, kv_heads, self.dim = (4, 2, 32) if bench.tiny else (32, 8, 128)
        generator = torch.Generator().manual_seed(length)
        shapes = [(1, count, length, self.dim) for count in (self.heads, kv_heads, kv_heads, self.heads)]
        *self.inputs, self.gradient = (
            # Rounded as the backends get them, whatever the dtype that computes.
            torch.randn(shape, generator=generator).to(bench.device, bench.dtype).to(dtype or bench.dtype)
            for shape in shapes
        )
        vectors = layout(kind, length)
        self.flops = 4 * self.heads * self.dim * attention_pairs(*vectors)
        segment_ids, is_visual = (vector.to(bench.device) for vector in vectors)
        self.mask = AttentionMask(segment_ids, is_visual)
        if ordered:
            order = visual_first_order(segment_ids, is_visual)
            self.mask = AttentionMask(segment_ids.gather(1, order), is_visual.gather(1, order), order.int())

    def forward(self, attend: Any) -> Tensor:
        """The result, without gradients."""
        with torch.no_grad():
            return attend(*self.inputs, self.mask)

    def both(self, attend: Any) -> list[Tensor]:
        """The result and the gradients of queries, keys and values."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        out = attend(*leaves, self.mask)
        return [out, *torch.autograd.grad(out, leaves, self.gradient)]


LAYOUTS = ("packed", "video", "branched")


def attention_part(bench: Bench) -> None:
    """Correctness and time of the backends, graphs of FlexAttention, and the connector with a changing T."""
    backends: dict[str, Any] = {"tiled": tiled_attention, "dense": dense_attention}
    if bench.tiny or not has_triton():
        bench.write("flex", skipped="FlexAttention has no backward on a CPU" if bench.tiny else "Triton is missing")
    else:
        triton = {"BACKEND": "TRITON"}
        backends = {"flex": flex, "flex, untuned": functools.partial(flex, options=triton, tuned=False), **backends}
        if kernel_options(bench.device):  # what `flex` takes by itself then
            backends["flex, Triton"] = functools.partial(flex, options=triton)
    lengths = (256, 384) if bench.tiny else (4_096, 16_384, 36_864)
    for kind in LAYOUTS:
        exact = Row(bench, kind, lengths[0], torch.float32).both(dense_attention)
        for name, attend in backends.items():
            with bench.figure("error", backend=name, layout=kind, tokens=lengths[0]) as values:
                found = Row(bench, kind, lengths[0]).both(attend)
                for part, value, wanted in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
                    values[part] = ((value.float() - wanted).norm() / wanted.norm()).item()
    del exact
    if "flex" in backends:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for length in range(1_100, 1_100 + 12 * 300, 300):
            with bench.figure("graphs", backend="flex", tokens=length) as values:
                first, best = bench.timed(functools.partial(Row(bench, "video", length).both, flex), 1)
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                values |= {"first_ms": 1e3 * first, "next_ms": 1e3 * best, "graphs": graphs}
    measure_connector(bench)
    for length in lengths:
        for kind in LAYOUTS:
            for name, attend in backends.items():
                if bench.over():
                    return
                with bench.figure("time", backend=name, layout=kind, tokens=length) as values:
                    row = Row(bench, kind, length)
                    _, forward = bench.timed(functools.partial(row.forward, attend))
                    first, best = bench.timed(functools.partial(row.both, attend))
                    values |= {"forward_ms": 1e3 * forward, "first_ms": 1e3 * first, "both_ms": 1e3 * best}
                    values["tflops"] = 3.5 * row.flops / best / 1e12  # backward computes the scores again
                    del row
        measure_order(bench, length, next(iter(backends.items())))


def measure_order(bench: Bench, length: int, backend: tuple[str, Any]) -> None:
    """A video as it is, and with its visual tokens first."""
    with bench.figure("visual_first", backend=backend[0], tokens=length) as values:
        for ordered in (False, True):
            run = functools.partial(Row(bench, "video", length, ordered=ordered).both, backend[1])
            values["ordered_ms" if ordered else "as_it_is_ms"] = 1e3 * bench.timed(run)[1]


def measure_connector(bench: Bench) -> None:
    """The first and the next call with always other numbers of visual tokens."""
    config = PRESETS["tiny" if bench.tiny else "4b"]
    connector = Connector(config.connector, config.vit, config.text).to(bench.device, bench.dtype)
    width = config.vit.hidden_size * len(config.vit.feature_layers)
    for count in (7, 50) if bench.tiny else (1_000, 1_001, 4_567, 10_368, 31_104):
        with bench.figure("connector", visual_tokens=count) as values:
            crops = -(-count // 81)
            features = torch.randn(crops, config.patches_per_crop, width, device=bench.device, dtype=bench.dtype)
            pooling = torch.randint(crops * config.patches_per_crop, (count, 9), device=bench.device)
            first, best = bench.timed(functools.partial(_connector_step, connector, features.requires_grad_(), pooling))
            values |= {"first_ms": 1e3 * first, "next_ms": 1e3 * best}


def _connector_step(connector: Connector, features: Tensor, pooling: Tensor) -> None:
    connector(features, pooling).square().mean().backward()


# --- step ------------------------------------------------------------------------------------------------------------

VARIANTS = [  # compiled, recompute, activation budget, 8-bit layers: the most useful first
    (True, "light", 1.0, False),
    (False, "full", 1.0, False),
    (True, "none", 0.4, False),
    (True, "light", 1.0, True),
    (True, "full", 1.0, False),
    (False, "light", 1.0, False),
    (True, "none", 1.0, False),
]


def step_part(bench: Bench) -> None:
    """Steps of the whole model: eager and compiled, by what is recomputed."""
    names = ("tiny",) if bench.tiny else ("nano", "4b")
    sizes = [(512, 4)] if bench.tiny else [(16_384, 128), (36_864, 384), (4_096, 0), (16_384, 0), (36_864, 128)]
    peak = (known_peak() or 0) * 1e12
    for name in names:
        kept = measure_saved(PRESETS[name], bench.dtype)
        for num_tokens, num_crops in sizes:
            if not fits(PRESETS[name], num_tokens, num_crops) and not bench.tiny:
                continue
            case = Case(PRESETS[name], num_tokens, num_crops)
            batch = make_batch(case, bench.device)
            for compiled, level, budget, fp8 in VARIANTS[:3] if bench.tiny else VARIANTS:
                if bench.over():
                    return
                label = {"model": name, "tokens": num_tokens, "crops": num_crops}
                variant = {"compiled": compiled, "recompute": level, "budget": budget, "fp8": fp8}
                with bench.figure("step", **label, **variant) as values:
                    _measure_step(bench, case.config, batch, variant, peak, values)
                    micro = MicroBatch(
                        tokens=num_tokens,
                        crops=num_crops,
                        recompute=level,
                        chunk_crops=None if level == "none" else CHUNK_CROPS,
                        item_size=torch.finfo(bench.dtype).bits // 8,
                        compiled=compiled,
                        budget=budget,
                    )
                    activations = sum(activation_bytes(case.config, kept, micro).values())
                    values["estimated_gib"] = (values.pop("weight_bytes") * 2 + activations) / GIB
    if not bench.tiny and not bench.over():
        case = Case(PRESETS["nano"], 4_096, 0)
        with bench.figure("transformers", model="nano", tokens=4_096, crops=0) as values:
            model, batch = make_ours(case.config, bench.device, bench.dtype), make_batch(case, bench.device)
            reference = make_theirs(model, "sdpa")
            theirs = bench.timed(functools.partial(run_step, their_loss(reference, case.config, batch)))[1]
            ours = bench.timed(functools.partial(run_step, functools.partial(trained_loss, model, batch)))[1]
            values |= {"theirs_ms": 1e3 * theirs, "ours_ms": 1e3 * ours}


def _measure_step(
    bench: Bench, config: ModelConfig, batch: Batch, variant: dict[str, Any], peak: float, values: dict[str, Any]
) -> None:
    model, level = make_ours(config, bench.device, bench.dtype), variant["recompute"]
    model.set_recompute(level, None if level == "none" else CHUNK_CROPS)
    if variant["fp8"]:
        use_fp8(model, bench.device)
    if variant["compiled"]:
        torch._dynamo.reset()
        compile_regions(model, "aot_eager_decomp_partition" if bench.tiny else "inductor", variant["budget"])
    values["weight_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    bench.reset_peak()
    losses: list[float] = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses.append(run_step(functools.partial(trained_loss, model, batch))[1])

    first, best = bench.timed(step)
    work = forward_flops(config, workload(batch))
    values |= {"loss": losses[-1], "first_s": first, "step_ms": 1e3 * best, "peak_gib": bench.peak_gib()}
    values["tflops"] = TRAINING_FACTOR * work.total / best / 1e12
    parts = component_seconds(model, batch, 1)
    values["parts_ms"] = {part: round(1e3 * seconds, 3) for part, seconds in parts.items()}
    if peak:
        values["mfu"] = {part: round(v, 4) for part, v in share_of_peak(work, parts, best, peak).items()}
    if tuple(variant.values()) == VARIANTS[0]:
        bench.write("kernels", model=config.name, tokens=batch.input_ids.numel(), top=_top_kernels(bench, step))


def _top_kernels(bench: Bench, step: Callable[[], None]) -> list[list[Any]]:
    """The 20 kernels that take longest in a step: name, milliseconds, calls."""
    kind = torch.profiler.ProfilerActivity.CPU if bench.tiny else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profile:
        step()

    def taken(event: Any) -> float:
        return float(event.self_cpu_time_total if bench.tiny else event.self_device_time_total)

    events = sorted(profile.key_averages(), key=taken, reverse=True)[:20]
    return [[event.key[:100], round(taken(event) / 1e3, 3), event.count] for event in events]


# --- train -----------------------------------------------------------------------------------------------------------


def train_part(bench: Bench) -> None:
    """The trainer: an engine of ZeRO-2 with a checkpoint, and 20 steps from shards with a resume."""
    import bench_gpu_train

    bench_gpu_train.measure(bench)


PARTS = {"attention": attention_part, "step": step_part, "train": train_part}


def main() -> int:
    """Measure, and write a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="what to measure (%(default)s)")
    parser.add_argument("--seconds", type=float, default=540, help="time of a part (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: at the smallest sizes")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; --device cpu runs everything at its smallest size")
    failed = 0
    for name in PARTS if args.part == "all" else [args.part]:
        bench = Bench(torch.device(args.device), args.seconds, part=name)
        bench.write("machine", hardware=hardware(), torch=torch.__version__, device=args.device)
        PARTS[name](bench)
        bench.write("end", seconds=time.monotonic() - bench.since, failed=bench.failed)
        failed += bench.failed
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
