"""`--help` of every program: it is quick, because arguments are parsed before torch is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [*sorted(path.relative_to(ROOT) for path in (ROOT / "tools").glob("*.py")), Path("molmo2/train.py")]
SLOW_MODULES = {"torch", "torchvision", "transformers", "deepspeed"}
CODE = """
import runpy, sys; del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(*sorted(sys.modules), sep="\\n", file=sys.stderr)
    sys.exit(end.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_arguments_are_parsed_before_torch_is_loaded(program: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(program), "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ") and "--help" in run.stdout
    loaded = run.stderr.split()
    assert "argparse" in loaded and not SLOW_MODULES & set(loaded)
