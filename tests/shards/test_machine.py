"""The cores and the memory that a container or a batch system grants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shards.machine import memory_text, usable_cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cg/cpu.max": "max 100000"}, 16),
        ({"cg/cpu.max": "250000 100000"}, 2),
        ({"cg/cpu.max": "50000 100000"}, 1),
        ({"cg/job/step/cpu.max": "max 100000", "cg/job/cpu.max": "400000 100000"}, 4),
        ({"cg/cpu/cpu.cfs_quota_us": "300000", "cg/cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cg/cpu/cpu.cfs_quota_us": "-1", "cg/cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)
def test_cores_follow_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name, text in {**files, "proc/self/cgroup": "0::/job/step\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path / "cg", tmp_path / "proc") == cores


def test_memory_is_said_in_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 4000000 kB\n")
    (tmp_path / "memory.max").write_text("8000000000\n")
    assert memory_text(tmp_path, tmp_path) == (
        "the machine has 16.4 GB of memory, 4.1 GB of it free, its control group allows 8.0 GB"
    )
    assert memory_text(tmp_path / "none", tmp_path / "none") == "its memory is not known"
