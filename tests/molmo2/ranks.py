"""Ranks for tests, forked from one process that has torch, DeepSpeed and the trainer loaded.

Two ways in:

    run_ranks(2, function, argument)        `function(argument)` on each rank of a gloo group
    Launch(["--recipe", path], ranks=2)     molmo2/train.py on two ranks, as torchrun starts it

What a launcher itself does (deepspeed, torchrun, accelerate, srun) is tested with the real one in test_launch.py,
test_slurm.py and by `train_runs.launch`.
"""

import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fork_server import CPU, ROOT, become, finish, fork_server, run_script

SCRIPT = "molmo2/train.py"
GRACE = 30.0  # seconds that ranks have to leave after one has failed, as under torchrun
__all__ = ["CPU", "ROOT", "SCRIPT", "Launch", "free_port", "run_ranks"]


# --- a function on each rank -----------------------------------------------------------------------------------------


def _rank(rank: int, world: int, folder: str, port: int, function: Callable[[Any], Any], argument: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    # DeepSpeed names its buffers after both, so that no other run of ranks on this machine has the same ones.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(argument), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
        buffer = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}"
        Path("/dev/shm", buffer).unlink(missing_ok=True)


def run_ranks(world: int, function: Callable[[Any], Any], argument: Any = None) -> list[Any]:
    """What `function(argument)` returned on each rank. The function must be importable: a module beside the tests."""
    fork_server()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[no-untyped-call]
            _rank, args=(world, folder, free_port(), function, argument), nprocs=world, start_method="forkserver"
        )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


# --- the trainer on each rank ----------------------------------------------------------------------------------------


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Launch:
    """molmo2/train.py on several ranks, each a process of its own below one that watches them.

    As under deepspeed, the first rank that fails has the others terminated, and its exit code is that of the whole.

    Args:
        arguments: the command line after the script's name.
        ranks: number of ranks; 1 sets no variables of a launcher, as plain `python` does.
        variables: environment of the ranks, whole.
        output: file that takes what the ranks print.
        file_limits: for some ranks the most bytes of a file that they can write, as on a full disk.
    """

    def __init__(
        self, arguments: list[str], ranks: int, variables: Mapping[str, str], output: Path, file_limits: dict[int, int]
    ) -> None:
        self.output = output
        self.process = fork_server().Process(
            target=_watch, args=(arguments, ranks, dict(variables), str(output), file_limits)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """The process above the ranks."""
        assert self.process.pid is not None
        return self.process.pid

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks that are there, in order."""
        return psutil.Process(self.pid).children()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit code.

        Raises:
            TimeoutError: it was still running, and has been killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output.read_text()}")
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the ranks, their workers and the process above them."""
        above = psutil.Process(self.pid)
        for victim in [above, *above.children(recursive=True)]:
            victim.kill()
        self.process.join()


def _watch(
    arguments: list[str], ranks: int, variables: dict[str, str], output: str, file_limits: dict[int, int]
) -> None:
    """Start the ranks, and end them all when one has failed; leaves with the code of the first that failed, or 0."""
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    become(str(ROOT), variables)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if (pid := os.fork()) == 0:
            if rank in file_limits:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limits[rank],) * 2)
            finish(lambda: run_script(SCRIPT, arguments))
        started.append(pid)
    os._exit(_wait_for_all(started))


def _wait_for_all(pids: list[int]) -> int:
    """The exit code of the first child that failed, 1 for a signal; the others are then terminated, later killed."""
    running, failed, deadline = set(pids), 0, float("inf")
    while running:
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            running.remove(pid)
            if (code := os.waitstatus_to_exitcode(status)) and not failed:
                failed, deadline = max(code, 1), time.monotonic() + GRACE
                for other in running:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return failed
