"""Watchdog: a thread that ends a stuck rank and reports the phase, the step and the packs in which it was stuck.

A rank that waits for another in a collective waits for ever on gloo and for half an hour on NCCL. When a phase takes
longer than the deadline, every rank that is alive reports its phase and exits. The straggler is the rank that reports
another phase than the rest.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from molmo2.parallel.agree import leave, write_line

EXIT_CODE = 1
STDERR = 2  # the file descriptor: the traceback is written without `sys.stderr`, whose lock may be held


class Phase(NamedTuple):
    """What a rank has been doing since `began` (monotonic clock, seconds)."""

    name: str
    step: int
    slots: tuple[int, ...]
    began: float


class Watchdog:
    """Watch one rank from construction until `stop`.

    Args:
        rank: this rank, for the message.
        deadline: seconds that a phase may take.
        end: called with the exit code to end the process.
    """

    def __init__(self, rank: int, deadline: float, end: Callable[[int], object] = leave) -> None:
        self.rank, self.deadline, self.end = rank, deadline, end
        self.phase = Phase("start", 0, (), time.monotonic())
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def enter(self, name: str, step: int, slots: tuple[int, ...] = ()) -> None:
        """Begin a phase; the phase before it has ended."""
        self.phase = Phase(name, step, slots, time.monotonic())

    def stop(self) -> None:
        """Stop watching."""
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.deadline / 4)):
            phase = self.phase
            passed = time.monotonic() - phase.began
            if passed > self.deadline:
                write_line(
                    f"train.py: rank {self.rank} has been in phase {phase.name!r} of step {phase.step} for "
                    f"{passed:.0f} s (packs {list(phase.slots)}), more than train.phase_deadline {self.deadline:g}; "
                    "the stacks of its threads follow. Compare with the other ranks: a rank in another phase is the "
                    "straggler. Start again to continue from the last checkpoint",
                    sys.stderr,
                )
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                self.stopped.set()
                self.end(EXIT_CODE)
