"""A lock that a killed process left in the folder of compiled extensions is removed; one that is held stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo2.training import stale_locks

HOLD = (
    "import os, sys, time; fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
)


def test_a_lock_is_removed_when_its_holder_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "some_operator/lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        past = time.time() - 5
        os.utime(lock, (past, past))
        assert stale_locks.remove_stale_locks() == [], "its holder lives"
        holder.kill()
    assert lock.exists()
    assert stale_locks.remove_stale_locks() == [lock]
    assert not lock.exists()


def test_a_lock_that_another_machine_may_hold_must_be_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(stale_locks, "_file_system", lambda path: "nfs4")
    lock = tmp_path / "py311_cu130/some_operator/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    for age, found in ((60.0, []), (1000.0, [lock])):
        os.utime(lock, (time.time() - age,) * 2)
        assert stale_locks.remove_stale_locks() == found


def test_a_young_lock_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator/lock").touch()
    assert stale_locks.remove_stale_locks() == []
    assert stale_locks._file_system(tmp_path) in stale_locks.LOCAL
