"""The command `molmo2` runs every program that a user starts, with its arguments and its exit code."""

import configparser
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from molmo2.__main__ import COMMANDS, ROOT, main

# Programs that only `make demo` or an administrator starts.
WITHOUT_COMMAND = {"build_on_datatrove", "demo_report", "make_demo_data"}


def test_every_program_of_a_user_has_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    programs = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"train"}
    assert {Path(program).stem for program in COMMANDS.values()} == programs - WITHOUT_COMMAND
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert "Build the shards of a stage from raw data. (tools/build_shards.py)" in "\n".join(lines)
    main([])
    assert capsys.readouterr().out.splitlines()[2:] == lines


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_reach_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["molmo2", name, "--help", "x y"])
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: started.append((path, run_name, *sys.argv)))
    main()
    program = str(ROOT / COMMANDS[name])
    assert started == [(program, "__main__", program, "--help", "x y")] and Path(program).is_file()


def test_a_program_ends_with_its_own_message_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match=r"preview_mixture: absent\.yaml: no such recipe"):
        main(["mixture", "absent.yaml"])
    with pytest.raises(SystemExit, match="molmo2: no command 'biuld'; it has new, train, build, "):
        main(["biuld"])


def test_the_package_installs_the_command() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split("\n")[1:] == ["molmo2 = molmo2.__main__:main"]
