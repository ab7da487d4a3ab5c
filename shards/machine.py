"""The processor cores and the memory that this process may use, which a container or a batch system may limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def usable_cores(cgroup: Path = CGROUP, proc: Path = PROC) -> int:
    """Number of cores that this process may use: its CPU affinity, and the CPU quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _cpu_quotas(cgroup, proc))]))


def _cpu_quotas(cgroup: Path, proc: Path) -> Iterator[float]:
    for folder in _control_groups(cgroup, proc):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield max(int(quota) / int(period), 1.0)  # "max 100000" is no limit: a ValueError
        with suppress(OSError, ValueError):  # version 1 of control groups
            limit = int((folder / "cpu.cfs_quota_us").read_text())
            if limit > 0:
                yield max(limit / int((folder / "cpu.cfs_period_us").read_text()), 1.0)


def _control_groups(cgroup: Path, proc: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of the groups above them; inside a container also the root."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (proc / "self/cgroup").read_text().splitlines()
    for base in (cgroup, cgroup / "cpu", cgroup / "cpu,cpuacct"):
        yield base
        for line in lines:
            path = Path(line.split(":", 2)[-1].lstrip("/"))
            if ".." not in path.parts:
                yield from (base / above for above in (path, *path.parents) if above != Path())


def memory_text(proc: Path = PROC, cgroup: Path = CGROUP) -> str:
    """The memory of this machine in words for an error message; a limit of a control group is named too."""
    sizes: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            name, value = line.split()[:2]
            sizes[name.rstrip(":")] = int(value) * 1024
    parts = []
    if "MemTotal" in sizes:
        free = sizes.get("MemAvailable", 0)
        parts.append(f"the machine has {sizes['MemTotal'] / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB of it free")
    for folder in _control_groups(cgroup, proc):
        with suppress(OSError, ValueError):
            parts.append(f"its control group allows {int((folder / 'memory.max').read_text()) / 1e9:.1f} GB")
            break
    return ", ".join(parts) or "its memory is not known"
