"""Metrics of a run during training: one line of JSON a step, its progress, and TensorBoard or W&B as in the recipe.

Progress is a bar on a terminal, and elsewhere, as in the file of a batch job, a line from time to time.
`log.jsonl` is the record: on resume, lines after the resumed step are dropped, so that every step is in it once.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from molmo2.config import Recipe
from molmo2.training.run import LOG_NAME
from shards.atomic import append_to, write_atomic
from shards.stream.collate import ReadStats

LINES = 100  # a run without a terminal prints about so many lines of progress
# The part of TensorBoard and W&B that shows a number, by the first part of its name; all others are in "train".
TAG_GROUPS = {
    **dict.fromkeys(("tokens", "fill", "crops", "retries", "cache_hits", "megabytes"), "data"),
    **dict.fromkeys(("masked", "share", "epochs"), "data"),
    **dict.fromkeys(("seconds", "tokens_per_second", "tflops", "mfu", "data_wait", "read_ms", "decode_ms"), "time"),
    **dict.fromkeys(("working_share", "slowest_rank", "gpu_memory_gib", "gpu_utilization"), "time"),
}
BAR = "{desc}: {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Parsed lines of a log; a last line without a line break, cut short when a run was killed, is left out.

    A file that does not exist has no lines.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_log(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step` and an unfinished last line, atomically."""
    if path.exists():
        lines = [line for line in read_log(path) if line["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


class Monitor:
    """Writes the metrics of one run; only rank 0 has one.

    Args:
        recipe: the run.
        start: optimizer steps done before, when the run resumes.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        directory = recipe.run_dir
        self.file = append_to(directory / LOG_NAME)
        self.bar = tqdm(
            total=recipe.train.steps,
            initial=start,
            desc=recipe.name,
            bar_format=BAR,
            dynamic_ncols=True,
            mininterval=0,  # with `miniters`: printed after every `log_every` steps
            miniters=recipe.train.log_every,
            disable=not sys.stderr.isatty(),
        )
        self.recipe, self.start, self.since = recipe, start, time.monotonic()
        self.tensorboard = self.wandb = None
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imported here because it is slow

            self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=start and start + 1)
        if recipe.logging.wandb:
            self.wandb = _start_wandb(recipe)

    def step(self, values: Mapping[str, Any]) -> None:
        """Record one step: "step" and flat numbers; names with a dot ("lr.vit") are grouped by their first part."""
        line = {name: _finite(value) for name, value in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.bar.disable:
            self._show_line(line["step"], values)
        else:
            self.bar.set_postfix_str(bar_text(values), refresh=False)
            self.bar.update(1)
        self.plot(line["step"], {name: value for name, value in values.items() if name != "step"})

    def _show_line(self, step: int, values: Mapping[str, Any]) -> None:
        steps = self.recipe.train.steps
        if step % max(self.recipe.train.log_every, steps // LINES) and step not in {self.start + 1, steps}:
            return
        elapsed = time.monotonic() - self.since
        left = elapsed / (step - self.start) * (steps - step)
        spent, eta = tqdm.format_interval(elapsed), tqdm.format_interval(left)
        progress = f"step {step}/{steps} [{spent}, ETA {eta}, {bar_text(values)}]"
        tqdm.write(f"{self.recipe.name}: {progress}", file=sys.stderr)

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers to TensorBoard and W&B, not to the log, under the names of `tag`."""
        numbers = {tag(name): value for name, value in values.items()}
        if self.tensorboard is not None:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def show(self, step: int, number: int, text: str, image: Any = None) -> None:
        """Write one generated sample to TensorBoard and W&B: its text, and its picture (a PIL image) if it has one."""
        if self.tensorboard is not None:
            self.tensorboard.add_text(f"held_out/samples/{number}", text, step)
            if image is not None:
                self.tensorboard.add_image(f"held_out/samples/{number}", np.asarray(image), step, dataformats="HWC")
        if self.wandb is not None:
            wandb = importlib.import_module("wandb")
            plain = wandb.Html(f"<pre>{html.escape(text)}</pre>")
            media = plain if image is None else wandb.Image(image, caption=text)
            self.wandb.log({f"held_out/samples/{number}": media}, step=step)

    def say(self, text: str) -> None:
        """Print a message without breaking the progress bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.close()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def tag(name: str) -> str:
    """The name of a number in TensorBoard and W&B: "train/loss", "data/tokens/toy", "time/mfu", "held_out/loss"."""
    first, path = name.partition(".")[0], name.replace(".", "/")
    return path if first == "held_out" else f"{TAG_GROUPS.get(first, 'train')}/{path}"


def bar_text(values: Mapping[str, Any]) -> str:
    """The numbers of a step beside the progress bar; the learning rate is that of the last component trained."""
    rates = [value for name, value in values.items() if name.startswith("lr.")]
    use = f"MFU {values['mfu']:.1%}" if "mfu" in values else f"{values['tflops']:.3g} TFLOP/s per rank"
    return (
        f"loss {values['loss']:.4f} | lr {rates[-1]:.2e} | {values['tokens_per_second']:,.0f} tok/s | {use} | "
        f"wait {values['data_wait']:.0%}"
        + (f" | ranks work {values['working_share']:.0%}" if "working_share" in values else "")
    )


class StepClock:
    """Measures the seconds of a step, the part spent waiting for data, and the time to read and decode each sample."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.passes: list[tuple[Any, Any]] = []
        self.seconds: dict[str, list[float]] = {"read": [], "decode": []}

    def waiting(self, since: float) -> None:
        """Count the time from `since` (perf_counter) until now as waiting."""
        self.waited += time.perf_counter() - since

    def reads(self, stats: ReadStats) -> None:
        """Add the times to read and decode the samples of a batch."""
        self.seconds["read"] += stats.read
        self.seconds["decode"] += stats.decode

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass; on a GPU with events, so that the host does not wait."""
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.passes.append((begin, end))
        else:
            since = time.perf_counter()
            yield
            self.passes.append((since, time.perf_counter()))

    def forward_seconds(self) -> list[float]:
        """The seconds of each forward pass since the last call; on a GPU it waits for the last one's end."""
        passes, self.passes = self.passes, []
        if not torch.cuda.is_available():
            return [end - begin for begin, end in passes]
        for _, end in passes[-1:]:
            end.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in passes]

    def lap(self) -> tuple[float, float, dict[str, float]]:
        """End the step: its seconds, the fraction spent waiting, and percentiles of milliseconds per sample."""
        now = time.perf_counter()
        seconds, waited = now - self.start, self.waited
        percentiles = {
            f"{name}_ms.p{percent}": 1000 * float(np.percentile(values, percent))
            for name, values in self.seconds.items()
            if values
            for percent in (50, 95)
        }
        self.start, self.waited, self.seconds = now, 0.0, {"read": [], "decode": []}
        return seconds, waited / max(seconds, 1e-9), percentiles


def gpu_use() -> dict[str, float]:
    """Peak memory of this rank's GPU, GiB, and its utilisation, percent; empty without a GPU.

    Utilisation needs NVML's Python binding (nvidia-ml-py), which torch does not install, and a GPU that reports it.
    """
    if not torch.cuda.is_available():
        return {}
    values = {"gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    if importlib.util.find_spec("pynvml"):
        with contextlib.suppress(importlib.import_module("pynvml").NVMLError):
            values["gpu_utilization"] = float(torch.cuda.utilization())
    return values


def _finite(value: Any) -> Any:
    """The value, or None in place of NaN or an infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(recipe: Recipe) -> Any:
    wandb = importlib.import_module("wandb")  # an optional dependency; `train.py` has checked that it is installed
    settings = recipe.model_dump(mode="json")
    names = {"project": recipe.logging.wandb, "name": recipe.name, "id": recipe.name}
    return wandb.init(**names, dir=str(recipe.run_dir), resume="allow", config=settings)
