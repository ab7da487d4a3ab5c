"""One process with torch and DeepSpeed loaded, from which tests fork what would else be a new interpreter.

These imports take five to ten seconds. `fork_server()` is the standard library's fork server with them done
(`preloaded.py`); ranks are started from it (`ranks.py`), and so are programs:

    run([python(), "tools/verify_shards.py", folder])

`python()` is the path of an executable that takes what python takes, a script, `-m` or `-c`, and has it run in a
process forked from there, with the arguments, the folder, the environment and the open files of its caller. It differs
from a new interpreter in three ways: modules are loaded already, but for the project's own and those that read the
environment when they are loaded; of the interpreter's options only `-u` is known, and has no effect; nothing runs at
exit. Launchers start their ranks with it where PYTHON_EXEC names it.
"""

import functools
import marshal
import multiprocessing
import os
import runpy
import select
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
RELOADED = ("huggingface_hub", "molmo2", "shards", "tools")
CLIENT = """#!{python} -IS
import marshal, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = marshal.dumps((sys.argv[1:], os.getcwd(), dict(os.environ)))
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """The fork server of this process."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    paths = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("", "shards", "molmo2"))]
    with mock.patch.dict(os.environ, CPU | {"PYTHONPATH": os.pathsep.join(paths)}):
        forkserver.ensure_running()
    return context


@functools.cache
def python() -> str:
    """The path of the executable; its server lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    path, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, path=path))
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    fork_server().Process(target=_serve, args=(path,), daemon=True).start()
    while not os.path.exists(path):
        time.sleep(0.01)
    return str(client)


def _serve(path: str) -> None:
    """Fork a process for each program; it ends with the process that started it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody has to wait for them
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(64)
    os.rename(f"{path}.new", path)
    parent = os.getppid()
    while os.getppid() == parent:
        if not select.select([listening], [], [], 1.0)[0]:
            continue
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Run one program and send its exit code; when the caller is killed, so is the program."""
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        arguments, folder, variables = marshal.loads(stream.read(int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        become(folder, variables)
        finish(functools.partial(_run_python, arguments))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(code.to_bytes(4, "big", signed=True))
    except OSError:  # the caller has ended
        pass
    os._exit(0)


def become(folder: str, variables: dict[str, str]) -> None:
    """Give a forked process the working folder, the environment and the modules of a new interpreter."""
    multiprocessing.set_start_method(None, force=True)  # a child of the fork server would start its own by it
    multiprocessing.current_process()._config["daemon"] = False  # it may have children
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.split(".")[0] in RELOADED]:
        del sys.modules[name]
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    sys.stdin = open(0, closefd=False)


def _run_python(arguments: list[str]) -> None:
    """What `python` does with these arguments."""
    first, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    if first == "-c":
        code, sys.argv = rest[0], ["-c", *rest[1:]]
        sys.path.insert(0, "")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        run_script(first, rest)


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script as `python script arguments` does."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    main = type(sys)("__main__")
    main.__file__ = os.path.abspath(script)
    sys.modules["__main__"] = main  # classes and functions of the script are pickled by this name
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def finish(program: Callable[[], Any]) -> NoReturn:
    """Run a program and end this process with its exit code."""
    code: Any = 1
    try:
        program()
        code = 0
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:  # the interpreter's own last resort: print and leave with 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
