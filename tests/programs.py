"""Programs that tests need and pip does not install: a browser, Slurm, sshd, pdsh."""

import os
import shutil


def why_missing(*programs: str) -> str | None:
    """Why tests that need these programs are skipped, or None where all are there."""
    missing = [program for program in programs if not shutil.which(program)]
    if not missing:
        return None
    remedy = (
        "SYSTEM=0 declined it" if os.environ.get("SYSTEM") == "0" else "`make system` installs it as root, with apt-get"
    )
    return f"not on PATH: {', '.join(missing)} ({remedy})"
