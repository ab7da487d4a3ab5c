"""Checks of a checkpoint that may be of somebody else: its list of files, and what its pickles would run.

DeepSpeed writes its states as pickles, and reads them with Python's whole unpickler, which calls any function that a
file names. Each file is therefore disassembled first, without being run. It may name the classes that torch regards as
safe, which hold tensors, and the few of DeepSpeed's that its own files hold; none of them runs code of the file.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from struct import error as StructError
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint

FILE_NAME = re.compile(r"[\w.-]{1,200}(/[\w.-]{1,200}){0,3}")
# Exceptions that an odd meta.json raises.
BAD_META = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
ALLOWED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def listed_files(meta: Any) -> dict[str, tuple[int, str]]:
    """The size and hash of every file of a checkpoint, by its name in the folder; raises one of `BAD_META`."""
    int(meta["step"])
    files = {name: (int(size), str(digest)) for name, (size, digest) in meta["files"].items()}
    for name in files:
        if ".." in name.split("/") or not FILE_NAME.fullmatch(name):
            raise ValueError(f"it names a file that no checkpoint has: {name[:200]!r}")
    return files


def find_foreign_code(states: Path) -> str | None:
    """The first file below a folder of states that cannot be unpickled safely, and why; None if all can."""
    for file in sorted(path for path in states.rglob("*") if not path.is_dir()):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(str(file))) - ALLOWED
        except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError, StructError) as error:
            return f"{file.name} is not a file of states as DeepSpeed writes them: {str(error).splitlines()[0]}"
        if foreign:
            return f"{file.name} would run code when it is read: it names {', '.join(sorted(foreign))[:200]}"
    return None
