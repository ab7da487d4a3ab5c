"""The command `molmo2`: one name for every program of the project.

    molmo2 build --stage sft --catalog mine.yaml
    molmo2 train --recipe recipe.yaml
    molmo2 look data/shards/sft --html mine.html

It runs the program in this process, with the other arguments as they are. A run on several GPUs is started by a
launcher, which wants the path of the program: `deepspeed molmo2/train.py …`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "new": "tools/new_dataset.py",
    "train": "molmo2/train.py",
    "build": "tools/build_shards.py",
    "look": "tools/inspect_shards.py",
    "chat": "tools/chat.py",
    "eval": "tools/evaluate.py",
    "export": "tools/export_model.py",
    "download": "tools/download_data.py",
    "data": "tools/inspect_data.py",
    "mixture": "tools/preview_mixture.py",
    "verify": "tools/verify_shards.py",
    "tokenizer": "tools/make_tokenizer.py",
}


def usage() -> str:
    """What `molmo2 --help` prints: every command with its program and the program's first line."""
    width, lines = max(map(len, COMMANDS)), []
    for name, program in COMMANDS.items():
        first = (ROOT / program).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
        lines.append(f"  {name:{width}}  {first} ({program})")
    return "\n".join(["usage: molmo2 COMMAND …; `molmo2 COMMAND --help` lists its options", "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program of a command as `python PROGRAM` would; it leaves with the program's exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in {"-h", "--help"}:
        sys.stdout.write(usage() + "\n")
        return
    if name not in COMMANDS:
        sys.exit(f"molmo2: no command {name!r}; it has {', '.join(COMMANDS)}")
    if not (program := ROOT / COMMANDS[name]).exists():
        sys.exit(f"molmo2 {name}: {program} is missing; install from a checkout: pip install -e .")
    sys.argv = [str(program), *rest]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
