"""The shape of the project: who imports whom, names, README, recipes, committed files."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import python

import shards

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"schema", "asked", "format", "layout", "share", "storage", "s3", "media", "timeline", "decode"}
BUILD = {"catalog", "download", "sources", "convert", "writer", "verify", "repair"}
BUILD |= {"builder", "build_pool", "build_task", "build_folder"}
STREAM = {"cache", "dataset", "mixture", "order", "packing", "plan", "reader", "read_ahead", "collate", "loader"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import; write the full name")
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT / "shards").parts[0].removesuffix(".py")


def test_shards_is_the_checkout() -> None:
    assert Path(shards.__file__).is_relative_to(ROOT)


@pytest.mark.parametrize(("package", "forbidden"), [("shards", {"molmo2", "tools"}), ("molmo2", {"tools"})])
def test_imports_point_downwards(package: str, forbidden: set[str]) -> None:
    for path in files(package):
        above = {name for name in imported(path) if name.split(".")[0] in forbidden}
        assert not above, f"{path} imports {above}"


def test_every_module_of_shards_is_on_a_known_side() -> None:
    parts = {part(path) for path in files("shards")} - {"__init__"}
    assert parts == LEAVES | BUILD | STREAM


@pytest.mark.parametrize(("side", "other"), [(BUILD, STREAM), (STREAM, BUILD), (LEAVES, BUILD | STREAM)])
def test_build_and_stream_meet_at_the_leaves(side: set[str], other: set[str]) -> None:
    for path in files("shards"):
        if part(path) in side:
            crossing = {n for n in imported(path) if n.startswith("shards.") and n.split(".")[1] in other}
            assert not crossing, f"{path} imports {crossing}"


def test_torch_stays_in_collate_and_loader() -> None:
    users = {part(path) for path in files("shards") if any(n.split(".")[0] == "torch" for n in imported(path))}
    assert users <= {"collate", "loader"}


def test_model_imports_torch_alone() -> None:
    for path in files("molmo2/model"):
        outside = {
            name
            for name in imported(path)
            if name.split(".")[0] not in sys.stdlib_module_names | {"torch"} and not name.startswith("molmo2.model")
        }
        assert not outside - {"molmo2"}, f"{path} imports {outside}"


@pytest.mark.parametrize("folder", ["tools", "molmo2"])
def test_no_file_shadows_the_standard_library(folder: str) -> None:
    """A script's own folder comes first on sys.path, so such a file would replace the stdlib module."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")} | {p.name for p in (ROOT / folder).iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_paths_in_the_documents_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    missing = []
    for document in documents:
        text = document.read_text()
        named = re.findall(
            r"\b(?:shards|molmo2|tools|recipes|tests|docs|benchmarks)/[\w./-]*\w\.(?:py|md|yaml)\b", text
        )
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        missing += [f"{document.name}: {name}" for name in named if not (ROOT / name).exists()]
        missing += [f"{document.name}: {link}" for link in links if not (document.parent / link).exists()]
    assert not missing


def commands_of(page: Path) -> list[str]:
    """Lines of a page's shell blocks, and what stands in backquotes elsewhere."""
    text = page.read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.split("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", plain)


@functools.cache
def help_of(script: str) -> str:
    run = subprocess.run([python(), ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("adding-a-dataset", "guide", "operations", "own-data", "quick-start")),
]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_know_their_options(page: str) -> None:
    """Every `tools/x.py --flag` names a flag that the tool's --help lists; make targets and recipes exist."""
    makefile = (ROOT / "Makefile").read_text()
    seen = 0
    for command in commands_of(ROOT / page):
        for target in re.findall(r"^make ([\w-]+)", command):
            seen += 1
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"
        script = re.search(r"\b((?:tools|molmo2|benchmarks)/\w+\.py)(.*)", command)
        if not script or not (ROOT / script[1]).exists():
            continue
        seen += 1
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", script[2]):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script[1])), f"{script[1]} has no {flag}"
        for recipe in re.findall(r"recipes/[\w/]+\.yaml", script[2]):
            assert (ROOT / recipe).exists(), recipe
    assert seen >= 4


def test_committed_files_are_small_and_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.splitlines() if (ROOT / n).is_file()]
    assert names
    large = [name for name in names if (ROOT / name).stat().st_size > 250_000]
    assert not large
    private = re.compile(rb"/(?:root|home)/[a-z]|\.\./shared")
    leaking = [n for n in names if n != "tests/test_project.py" and private.search((ROOT / n).read_bytes())]
    assert not leaking
