"""Atomic writes and locks: what a failed block, a second process and a killed process leave behind."""

import contextlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import shards
from shards.atomic import (
    LockHeldError,
    append_to,
    create_atomic,
    file_lock,
    remove_temporary_files,
    replacing,
    write_atomic,
)

HOLD = """
import sys
from pathlib import Path
from shards.atomic import file_lock
with file_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomic(path, "für\n", durable=durable)
    assert path.read_bytes() == "für\n".encode()
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == "für\n".encode()
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["b.json"]


def test_a_failed_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_atomic(path, b"old")
    for fixed in (None, tmp_path / ".fixed"):
        with pytest.raises(KeyError), replacing(path, temporary=fixed) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError
        with pytest.raises(FileNotFoundError), replacing(path, temporary=fixed):
            pass  # nothing was written
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["b.json"]


def test_one_of_many_creates_a_file(tmp_path: Path) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        if create_atomic(tmp_path / "mark", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number) for number in wins] == [(tmp_path / "mark").read_text()]
    assert names(tmp_path) == ["mark"]


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from shards.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    write_atomic(tmp_path / "a", b"old")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")])
    assert len(names(tmp_path)) == 2
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("held", ["exclusive", "shared"])
def test_locks_exclude_each_other_until_the_holder_is_killed(tmp_path: Path, held: str, shared: bool) -> None:
    lock = tmp_path / "folder" / ".lock"
    command = [sys.executable, "-c", HOLD, str(lock), held]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        together = held == "shared" and shared
        expected = (
            contextlib.nullcontext() if together else pytest.raises(LockHeldError, match=r"\.lock: another process")
        )
        with expected, file_lock(lock, shared=shared):
            pass
        inode = lock.stat().st_ino
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        with file_lock(lock, wait=True):  # waits for the kill, no longer
            timer.join()
    with file_lock(lock):
        assert lock.stat().st_ino == inode


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    with append_to(tmp_path / "log") as file:
        file.write("ü\n")
    with append_to(tmp_path / "log") as file:
        file.write("2\n")
    assert (tmp_path / "log").read_bytes() == b"\xc3\xbc\n2\n"
    for target in ("log", "missing", "/dev/null"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(OSError, match="is a link, and is not written to; remove it"):
            append_to(tmp_path / "link")
    assert (tmp_path / "log").read_bytes() == b"\xc3\xbc\n2\n" and not (tmp_path / "missing").exists()


def test_everything_that_is_appended_to_is_opened_there() -> None:
    """Files of unfinished downloads and locks are opened by themselves: their names cannot be in an archive."""
    root = Path(shards.__file__).resolve().parents[1]
    files = [file for name in ("shards", "molmo2", "tools") for file in (root / name).rglob("*.py")]
    opening = {file.name for file in files if re.search(r'open\([^\n]*"ab?"', file.read_text())}
    assert opening == {"atomic.py", "fetch.py"}


def test_a_link_that_comes_between_check_and_opening_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with pytest.raises(OSError, match="symbolic links"):
        append_to(tmp_path / "link")
    assert not (tmp_path / "target").exists()
