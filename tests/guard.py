"""Run the tests with a limit of time, and fail when they leave something behind.

    python tests/guard.py --minutes 30 -- python -m pytest -n 2

Everything temporary goes to one new folder, and every process of the run inherits its name, by which it is found
again. After the limit the tests that were running are named, the stacks of all Python processes of the run are printed,
and the processes are killed. After the end a run fails that left a process (and so an open port), a buffer in /dev/shm,
or a file in the checkout or in the home folder. What it does not do: limit one test, which is pytest-timeout's work.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[1]
NAME = "MOLMO2_TEST_RUN"  # the variable with the run's folder
SHARED_MEMORY = Path("/dev/shm")
# What torch compiles belongs to the environment that it is compiled against, and is kept in it from run to run.
COMPILED = {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TORCHINDUCTOR_CACHE_DIR": "torch_inductor"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 5.0  # seconds that a process has to leave after the tests


def processes(folder: Path) -> list[psutil.Process]:
    """Every process of the run, this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(NAME) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def describe(process: psutil.Process) -> str:
    """Number and command line of a process."""
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid}: ended meanwhile"


def kill(folder: Path) -> None:
    """Kill every process of the run; one that starts another meanwhile is met in the next round."""
    while left := processes(folder):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=PATIENCE)


def say(text: str) -> None:
    """A line among what the tests print."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def dump(folder: Path) -> None:
    """Print which tests are running, and where each Python process of the run stands."""
    for path in sorted(folder.glob("running-*")):
        say(f"guard: running: {path.read_text()}")
    for process in processes(folder):
        say(f"\n--- {describe(process)}")
        subprocess.run(["py-spy", "dump", "--pid", str(process.pid)], check=False, timeout=60)


def files_of_the_machine() -> set[str]:
    """What a test must not add to: files of the checkout that git neither tracks nor ignores, and the home folder."""
    command = ["git", "ls-files", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    home = Path.home()
    folders = [folder for folder in (home, home / ".cache", home / ".config") if folder.is_dir()]
    return {str(ROOT / name) for name in listed} | {str(path) for folder in folders for path in folder.iterdir()}


def mapped(path: Path) -> bool:
    """Whether a process still maps a file of shared memory: then it belongs to another run."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:  # ended meanwhile, or of another user
            continue
    return False


def leftovers(folder: Path, files: set[str], buffers: set[Path]) -> list[str]:
    """What a run left behind, one line each.

    Args:
        folder: the run's folder.
        files: `files_of_the_machine()` before the run.
        buffers: what was in /dev/shm before it.
    """
    end = time.monotonic() + PATIENCE
    while (left := processes(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    lines = [f"process {describe(process)}" for process in left]
    kill(folder)
    lines += [f"buffer {path}" for path in sorted(set(SHARED_MEMORY.iterdir()) - buffers) if not mapped(path)]
    return lines + [f"file {name}" for name in sorted(files_of_the_machine() - files)]


def run(command: list[str], minutes: float) -> int:
    """Run a command; its exit code, or 1 where it took too long or left something behind."""
    folder = Path(tempfile.mkdtemp(prefix="molmo2-tests-"))
    variables = {NAME: str(folder), "TMPDIR": str(folder)}
    variables |= {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    for name, folder_name in COMPILED.items():
        variables[name] = os.environ.get(name, str(Path(sys.prefix, folder_name)))
        Path(variables[name]).mkdir(parents=True, exist_ok=True)
    files, buffers = files_of_the_machine(), set(SHARED_MEMORY.iterdir())
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        code = process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        say(f"\nguard: still running after {minutes:g} minutes")
        dump(folder)
        kill(folder)
        return 1
    else:
        left = leftovers(folder, files, buffers)
        for line in left:
            say(f"guard: left behind: {line}")
        return code or int(bool(left))
    finally:
        kill(folder)
        shutil.rmtree(folder, ignore_errors=True)


def stop(number: int, frame: object) -> NoReturn:
    """End the run; a second signal (make passes its own on as well) must not interrupt the cleaning up."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    """The command line; an interrupt or a termination ends the tests as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="limit of time (%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, after --")
    arguments = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, stop)
    return run(arguments.command[arguments.command[0] == "--" :], arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
