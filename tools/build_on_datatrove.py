"""Build shards with datatrove's executors: processes of this machine or a Slurm job array.

    python tools/build_on_datatrove.py --engine local --tasks 4 -- --stage sft --catalog demo --workers 1
    python tools/build_on_datatrove.py --engine slurm --tasks 64 --partition cpu --cpus 16 -- --stage sft --workers 16

Arguments after `--` are passed to tools/build_shards.py; each task of the engine runs it as task r/N, and a last run
writes the indexes. Finished shards are kept, so the same command resumes. Needs the extra "datatrove".
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molmo2.config import data_path
from shards.command import run

TOOL = Path(__file__).resolve().with_name("build_shards.py")
ENGINES = ("local", "slurm")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--tasks", type=int, required=True, help="number of tasks to run at the same time")
    parser.add_argument("--logs", default=str(data_path("logs/datatrove")), help="the engine's folder (%(default)s)")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--time", default="24:00:00", help="time limit of a Slurm job (%(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a task, for Slurm (%(default)s)")
    parser.add_argument("--gb", type=int, default=4, help="memory per CPU in GB (%(default)s)")
    parser.add_argument("--sbatch", nargs="*", default=[], metavar="KEY=VALUE", help="Slurm options: account=lab …")
    parser.add_argument("build", nargs="+", metavar="-- …", help="arguments of build_shards.py")
    args = parser.parse_args()
    if args.engine == "slurm" and not args.partition:
        parser.error("--engine slurm needs --partition")
    if wrong := [pair for pair in args.sbatch if "=" not in pair]:
        parser.error(f"--sbatch {wrong[0]}: write KEY=VALUE")
    if args.tasks < 1:
        parser.error(f"--tasks {args.tasks}: at least one")
    if "--task" in args.build:
        parser.error("--task is the engine's to say; take it from the arguments after --")
    return args


def build_task(data: Any, rank: int, world_size: int, *, command: Sequence[str]) -> Any:
    """A step of a datatrove pipeline without documents: run task `rank`/`world_size` of the build in a new process.

    A build needs child processes (hanging decoders are killed), which an engine's worker process may not start.
    """
    import subprocess  # imported here: the function is pickled without its module

    subprocess.run([*command, "--task", f"{rank}/{world_size}"], check=True)
    yield from data or ()


def executor(args: argparse.Namespace, name: str, tasks: int, depends: Any = None) -> Any:
    """The engine's executor of `tasks` tasks, which start after the executor `depends`."""
    step: Callable[..., Any] = functools.partial(build_task, command=[sys.executable, str(TOOL), *args.build])
    # The builder decides which shards are finished: an engine that skips tasks would not notice changed data.
    common: dict[str, Any] = {"logging_dir": f"{args.logs}/{name}", "skip_completed": False, "depends": depends}
    if args.engine == "local":
        from datatrove.executor import LocalPipelineExecutor

        return LocalPipelineExecutor([step], tasks=tasks, workers=tasks, **common)
    from datatrove.executor.slurm import SlurmPipelineExecutor

    common |= {"cpus_per_task": args.cpus, "mem_per_cpu_gb": args.gb}
    site: dict[str, Any] = {"partition": args.partition, "time": args.time, "qos": ""}
    site["sbatch_args"] = dict(pair.split("=", 1) for pair in args.sbatch)
    # PATH must hold this environment's commands, which the engine's job script calls.
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    return SlurmPipelineExecutor([step], tasks=tasks, job_name=f"shards-{name}", env_command=path, **site, **common)


def main() -> None:
    """Run all tasks, then one run of the whole dataset that writes the indexes."""
    args = parse_args()
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError("datatrove is not installed: pip install -e '.[datatrove]'")
    tasks = executor(args, "tasks", args.tasks)
    executor(args, "index", 1, depends=tasks).run()


if __name__ == "__main__":
    run(main)
