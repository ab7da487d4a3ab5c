"""The shape of the project: who imports whom, names, README, recipes, committed files."""

import ast
import configparser
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shards

ROOT = Path(__file__).resolve().parents[1]
# Folder (or package) -> where its files must not import from. The folders themselves hold the parts.
FORBIDDEN = {
    "shards": ["molmo2", "tools"],
    "molmo2": ["tools"],
    "shards/build": ["shards.stream"],
    "shards/stream": [f"shards.{name}" for name in ("build", "catalog", "sources", "convert", "download")],
    "shards/storage": [f"shards.{name}" for name in ("build", "stream", "catalog", "sources", "convert", "download")],
    "shards/media": [f"shards.{name}" for name in ("build", "stream", "catalog", "sources", "convert", "download")],
    "molmo2/training": [f"molmo2.{name}" for name in ("export", "chat", "eval", "inspection", "demo")],
}


@functools.cache
def imported(path: Path, nested: bool = True) -> frozenset[str]:
    """Every module that a file imports, as dotted names; with `nested` also inside functions."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: relative import; write the full name")
    return frozenset(names)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    paths = [path for package in ("shards", "molmo2", "tools") for path in files(package)]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_shards_is_the_checkout() -> None:
    assert Path(shards.__file__).is_relative_to(ROOT)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_follow_the_arrows(folder: str) -> None:
    crossing = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(folder)
        for name in sorted(imported(path))
        if any(name == above or name.startswith(f"{above}.") for above in FORBIDDEN[folder])
    ]
    assert not crossing


def test_files_beside_the_folders_of_shards_are_leaves() -> None:
    """They import each other and nothing that lies in a folder."""
    top = {path.stem for path in (ROOT / "shards").glob("*.py")}
    for path in (ROOT / "shards").glob("*.py"):
        own = {name for name in imported(path) if name.startswith("shards.")}
        assert all(name.split(".")[1] in top for name in own), f"{path} imports {own}"


def test_the_top_of_molmo2_is_the_command_and_its_recipe() -> None:
    assert {path.name for path in (ROOT / "molmo2").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "train.py",
        "config.py",
        "pages.py",
    }


def test_pages_extend_the_base_template_and_are_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in setup["options.package_data"]["molmo2"].split(",")]
    installed = {path for pattern in patterns for path in (ROOT / "molmo2").glob(pattern)}
    templates = set((ROOT / "molmo2").rglob("*.jinja")) | set((ROOT / "molmo2").rglob("*.html"))
    assert templates <= installed
    skeletons = {path.name for path in templates if "<html" in path.read_text()}
    assert skeletons == {"base.html.jinja"}


def test_no_imports_in_a_circle() -> None:
    """Imports inside functions count: a circle there is a circle of meaning."""
    known = modules()
    graph = {name: {other for other in imported(path) if other in known} - {name} for name, path in known.items()}
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_torch_stays_where_batches_are_made() -> None:
    users = {path.stem for path in files("shards") if any(n.split(".")[0] == "torch" for n in imported(path))}
    assert users == {"collate", "loader", "slots"}


def test_model_imports_torch_alone() -> None:
    """And peft and torchao, in the functions that make adapters and 8-bit layers."""
    allowed = sys.stdlib_module_names | {"torch", "peft", "torchao"}
    for path in files("molmo2/model"):
        outside = {
            name for name in imported(path) if name.split(".")[0] not in allowed and not name.startswith("molmo2.model")
        }
        assert not outside, f"{path} imports {outside}"


def test_training_imports_little() -> None:
    """What `train.py` loads to train, without what only a flag needs."""
    known = modules()
    seen: set[str] = set()
    waiting = ["molmo2.train", "molmo2.training.stages"]  # the second is loaded when the command line has been read
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for other in imported(known[name], nested=False) if other in known]
    lines = sum(len(known[name].read_text().splitlines()) for name in seen)
    assert lines <= 8000, f"{len(seen)} files, {lines} lines"


@pytest.mark.parametrize("folder", ["tools", "molmo2"])
def test_no_file_shadows_the_standard_library(folder: str) -> None:
    """A script's own folder comes first on sys.path, so such a file would replace the stdlib module."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")} | {p.name for p in (ROOT / folder).iterdir()}
    assert not names & set(sys.stdlib_module_names)


def test_paths_in_the_documents_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    documents.remove(ROOT / "docs/log.md")  # it names files as they were on the day
    missing = []
    for document in documents:
        text = document.read_text()
        named = re.findall(
            r"\b(?:shards|molmo2|tools|recipes|tests|docs|benchmarks)/[\w./-]*\w\.(?:py|md|yaml|jsonl|png)\b",
            re.sub(r"https?://\S+", "", text),
        )
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
        missing += [f"{document.name}: {name}" for name in named if not (ROOT / name).exists()]
        missing += [f"{document.name}: {link}" for link in links if not (document.parent / link).exists()]
    assert not missing


def test_committed_files_are_small_and_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.splitlines() if (ROOT / n).is_file()]
    assert names
    large = [name for name in names if (ROOT / name).stat().st_size > 250_000]
    assert not large
    private = re.compile(rb"/(?:root|home)/[a-z]|\.\./shared")
    leaking = [n for n in names if n != "tests/test_project.py" and private.search((ROOT / n).read_bytes())]
    assert not leaking
