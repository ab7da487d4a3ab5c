"""How hard the tree is to enter: sizes of files and functions, circles of imports, names that stand twice.

    python benchmarks/bench_tree.py                this checkout
    python benchmarks/bench_tree.py --root DIR     another one, to compare with

It reads source text alone: nothing of the tree is imported. Product code is `shards`, `molmo2` and `tools`. A twin name
is a public class or function of module level that two files of the product define; `main` and `parse_args` are not
counted, since every command has them.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PRODUCT = ("shards", "molmo2", "tools")
LONG = 50  # lines of a function
GOALS = {"circles": 0, "lines_to_train": 8000, "product_lines": 20500, "median_file": 150, "twin_names": 0}
AT_LEAST = {"median_file"}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    paths = [path for package in PRODUCT for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(tree: ast.Module, known: dict[str, Path], *, nested: bool) -> set[str]:
    """Modules of the product that a module imports; with `nested` also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else str(node.module))
    return names & set(known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or not."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return [sorted(group) for group in groups]


def loaded(start: str, graph: dict[str, set[str]]) -> set[str]:
    """The modules that are loaded when one is, the packages around them included."""
    seen, waiting = set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name in graph and name not in seen:
            seen.add(name)
            waiting += [*graph[name], name.rpartition(".")[0]]
    return seen


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def measure(root: Path) -> dict[str, float]:
    """The figures of a checkout."""
    known = modules(root)
    sources = {name: path.read_text(encoding="utf-8") for name, path in known.items()}
    trees = {name: ast.parse(source) for name, source in sources.items()}
    lines = {name: source.count("\n") for name, source in sources.items()}
    sizes = [count for count in lines.values() if count]
    public = Counter(
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name not in {"main", "parse_args"}
    )
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1 for tree in trees.values() for node in functions(tree)
    ]
    train = loaded("molmo2.train", {n: imports(t, known, nested=False) for n, t in trees.items()})
    tests = [path.read_text(encoding="utf-8").count("\n") for path in sorted((root / "tests").rglob("*.py"))]
    fields = [
        node for node in trees["molmo2.config"].body if isinstance(node, ast.ClassDef)
        for node in node.body if isinstance(node, ast.AnnAssign)
    ]  # fmt: skip
    return {
        "product_files": len(sizes),
        "product_lines": sum(sizes),
        "test_lines": sum(tests),
        "median_file": statistics.median(sizes),
        "largest_file": max(sizes),
        "files_below_150": sum(size < 150 for size in sizes),
        "functions": len(lengths),
        "functions_above_50": sum(length > LONG for length in lengths),
        "circles": len(circles({n: imports(t, known, nested=True) for n, t in trees.items()})),
        "files_to_train": sum(lines[name] > 0 for name in train),
        "lines_to_train": sum(lines[name] for name in train),
        "twin_files": sum(
            count > 1 for count in Counter(p.name for p in known.values() if p.stem != "__init__").values()
        ),
        "twin_names": sum(count > 1 for count in public.values()),
        "recipe_fields": len(fields),
        "flags": sum(source.count("add_argument(") for source in sources.values()),
    }


def main() -> None:
    """Measure, print, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="(%(default)s)")
    found = measure(parser.parse_args().root)
    bars = {}
    for name, value in found.items():
        goal = GOALS.get(name)
        ok = goal is None or (value >= goal if name in AT_LEAST else value <= goal)
        if goal is not None:
            bars[name] = {"value": value, "bar": goal, "ok": ok}
        print(f"{name:20} {value:8g}" + ("" if goal is None else f"   goal {goal:g}{'' if ok else ', missed'}"))
    print(json.dumps({"bench": "tree", "hardware": "any", "bars": bars, "measured": found}))


if __name__ == "__main__":
    main()
