"""The lock of a run's folder: one holder at a time, and no worker keeps it after its rank."""

import os
from pathlib import Path

import pytest

from molmo2.training.run import LOCK_NAME, TrainingError, lock_run


def test_a_second_holder_is_refused_by_name(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"):
        with (
            pytest.raises(TrainingError, match=f"process {os.getpid()} on .* trains this run"),
            lock_run(tmp_path / "run"),
        ):
            pass
    with lock_run(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).read_text().count("process") == 1


def test_a_child_that_outlives_the_holder_does_not_hold_the_lock(tmp_path: Path) -> None:
    (reading, writing), (ready, started) = os.pipe(), os.pipe()
    with lock_run(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.write(started, b"x")  # what runs after a fork has run
            os.read(reading, 1)  # until the parent closes its end
            os._exit(0)
        os.read(ready, 1)
    try:
        with lock_run(tmp_path):
            pass
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        for descriptor in (reading, ready, started):
            os.close(descriptor)
