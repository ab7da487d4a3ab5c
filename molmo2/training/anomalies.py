"""Loss spikes and losses that are not finite: they are detected before the update, so that the update can be skipped.

All ranks see the same sums and the same history, so they all decide alike. The history is in every checkpoint, so that
a resumed run decides as an uninterrupted one would. Each anomaly is written to `anomalies.jsonl` with the samples of
its step, which the plan knows; `train.py --replay STEP` computes their losses again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from molmo2.config import Anomalies
from shards.stream.dataset import Dataset
from shards.stream.plan import Draw, StepSpec

HISTORY = 100  # a loss is compared with the median of this many before it
MIN_HISTORY = 20  # a spike is judged only after this many losses


class LossHistory:
    """The last `HISTORY` losses whose steps updated the weights, oldest first, and the number of skips in a row."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses = deque(losses, HISTORY)
        self.skips = 0

    def judge(self, loss: float, settings: Anomalies) -> str | None:
        """Classify a step's loss: "nonfinite", "spike", or None for a normal one."""
        if not math.isfinite(loss):
            return "nonfinite"
        if settings.spike_factor is None or len(self.losses) < MIN_HISTORY:
            return None
        return "spike" if loss > settings.spike_factor * statistics.median(self.losses) else None

    def add(self, loss: float, skipped: bool) -> None:
        """Record the loss of a step that is over, or count the step as skipped."""
        self.skips = self.skips + 1 if skipped else 0
        if not skipped:
            self.losses.append(loss)


def action_for(kind: str | None, history: LossHistory, settings: Anomalies) -> str:
    """What to do with a step: "update", "record" (and update), "skip" or "stop"."""
    if kind is None:
        return "update"
    action = settings.nonfinite if kind == "nonfinite" else settings.spike
    return "stop" if action == "skip" and history.skips >= settings.max_skips else action


def describe(step: StepSpec, datasets: Sequence[Dataset], kind: str, loss: float, action: str) -> dict[str, Any]:
    """A line of `anomalies.jsonl`: the packs of the step, each with its samples as "dataset/shard/row"."""
    packs = [[sample_name(datasets, draw) for draw in pack.draws] for pack in step.packs]
    value = loss if math.isfinite(loss) else None  # JSON has no NaN
    return {"step": step.step + 1, "kind": kind, "loss": value, "action": action, "packs": packs}


def sample_name(datasets: Sequence[Dataset], draw: Draw) -> str:
    """The name of a sample by its location: "dataset/shard/row"."""
    tars = datasets[draw.dataset].tars
    return f"{tars.name}/{tars.shards[draw.shard]}/{draw.row}"
