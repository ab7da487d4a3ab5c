"""A thread that ends a rank which is stuck, and says where: in which phase of which step, with which packs.

A rank that waits for another in a collective waits for ever on gloo and for half an hour on NCCL. When no phase has
ended within the deadline, every rank that is alive says what it is doing, and ends; the one that has another phase than
the rest is the culprit.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from molmo2.parallel.agree import leave, write

EXIT_CODE, STDERR = 1, 2  # the descriptor: it needs no Python object, whatever state they are in


class Phase(NamedTuple):
    """What a rank does since `began` (monotonic seconds)."""

    name: str
    step: int
    slots: tuple[int, ...]
    began: float


class Watchdog:
    """Watches one rank from now on until `stop`.

    Args:
        rank: this rank, for the message.
        deadline: seconds that a phase may take.
        end: what ends the process.
    """

    def __init__(self, rank: int, deadline: float, end: Callable[[int], object] = leave) -> None:
        self.rank, self.deadline, self.end = rank, deadline, end
        self.phase = Phase("start", 0, (), time.monotonic())
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def enter(self, name: str, step: int, slots: tuple[int, ...] = ()) -> None:
        """A phase begins: the one before has ended."""
        self.phase = Phase(name, step, slots, time.monotonic())

    def stop(self) -> None:
        """Watch no longer."""
        self.stopped.set()

    def _watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.deadline / 4)):
            phase = self.phase
            passed = time.monotonic() - phase.began
            if passed > self.deadline:
                write(
                    f"train.py: rank {self.rank} has been in phase {phase.name!r} of step {phase.step} for "
                    f"{passed:.0f} s (packs {list(phase.slots)}), more than train.phase_deadline {self.deadline:g}; "
                    "where its threads are follows. Compare with the other ranks: one that is in another phase held "
                    "them up. Start again to continue from the last checkpoint",
                    sys.stderr,
                )
                faulthandler.dump_traceback(file=STDERR, all_threads=True)
                self.stopped.set()
                self.end(EXIT_CODE)
