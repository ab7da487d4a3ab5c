"""A real Slurm of two nodes on this machine: munge, one controller, two slurmd, on free ports, in one folder."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from programs import why_missing

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={controller}
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d_%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 RealMemory=1024 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 RealMemory=1024 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    return why_missing(*PROGRAMS) or (None if os.getuid() == 0 else "slurmd needs root")


def ports(count: int) -> list[int]:
    """Free ports."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two idle nodes, n1 and n2; yields the variables with which Slurm's commands find them."""
    controller, first, second = ports(3)
    for name in ("ctld", "spool_n1", "spool_n2", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o700)
    (folder / "munge/key").write_bytes(os.urandom(1024))
    (folder / "munge/key").chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, controller=controller, first=first, second=second)
    )
    variables = {**os.environ, "SLURM_CONF": str(config)}
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{name}={folder}/munge/{file}" for name, file in names.items())]
    commands = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]

    def told() -> str:
        return (folder / "daemons.log").read_text()[-2000:]

    started: list[subprocess.Popen[bytes]] = []
    with open(folder / "daemons.log", "ab") as log:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
                if command is munge:
                    wait_for(lambda: (folder / "munge/socket").exists(), told)
            idle = ("sinfo", "-h", "-N", "-t", "idle")
            wait_for(lambda: len(slurm(variables, *idle, check=False).splitlines()) == 2, told)
            yield variables
        finally:
            for process in reversed(started):
                # What a killed slurmd leaves behind (slurmstepd) is a child of its own, elsewhere.
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
                process.wait()
            for stray in psutil.process_iter():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if stray.pid != os.getpid() and belongs(stray, config):
                        stray.kill()


def belongs(process: psutil.Process, config: Path) -> bool:
    """Whether a process is of this cluster; a job's own (slurmstepd) has no environment, and a log in its folder."""
    if process.name().startswith("slurmstepd"):
        return any(Path(file.path).is_relative_to(config.parent) for file in process.open_files())
    return process.environ().get("SLURM_CONF") == str(config)


def wait_for(condition: Callable[[], bool], told: Callable[[], str]) -> None:
    """Up to a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(told())


def slurm(variables: dict[str, str], *command: str, check: bool = True) -> str:
    """What one of Slurm's commands prints."""
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout
