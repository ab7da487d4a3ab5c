"""Two machines for tests that launch over ssh: an sshd of this user that listens on two loopback addresses."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from programs import why_missing
from ranks import free_port

ADDRESSES = ("127.0.0.2", "127.0.0.3")
SERVER = """
Port {port}
ListenAddress {addresses[0]}
ListenAddress {addresses[1]}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """
Port {port}
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking accept-new
"""


def why_not() -> str | None:
    """Why no machine can be reached over ssh here, or None."""
    return why_missing("sshd", "ssh", "ssh-keygen", "pdsh")


@contextmanager
def machines(folder: Path) -> Iterator[dict[str, str]]:
    """Start the server; yields the variables with which `ssh` reaches both addresses by a key made for the test."""
    paths = {"folder": folder, "port": free_port(), "addresses": ADDRESSES}
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "sshd_config").write_text(SERVER.format(**paths))
    (folder / "ssh_config").write_text(CLIENT.format(**paths))
    # ssh reads the account's own configuration whatever HOME is, hence a command in front of it that names ours.
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd wants it; a booted machine has it
    variables = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    with open(folder / "sshd.log", "wb") as log:
        server = subprocess.Popen([str(shutil.which("sshd")), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            _wait_for(variables, folder / "sshd.log")
            yield variables
        finally:
            for process in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()  # the sessions, and what a test that failed left running in them, as well
            server.wait()


def _wait_for(variables: dict[str, str], log: Path) -> None:
    for _ in range(50):
        answers = [
            subprocess.run(["ssh", address, "true"], env=variables, capture_output=True) for address in ADDRESSES
        ]
        if not any(answer.returncode for answer in answers):
            return
        time.sleep(0.1)
    raise AssertionError(f"{answers}\n{log.read_text()}")
