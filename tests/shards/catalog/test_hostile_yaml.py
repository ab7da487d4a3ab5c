"""YAML that a few lines make huge or deep: one short error of a catalog and of a recipe, and at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from molmo2.config import RecipeError, load_recipe
from shards.catalog import CatalogError, load_catalog
from shards.yaml_limits import MAX_DEPTH, MAX_NODES, check_yaml


def aliases(first: str, line: str) -> str:
    """Nine lines, each of which names the one before it nine times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} " + line.replace("*", f"*a{n - 1}") for n in range(1, 9)]
    return "\n".join(lines)


HOSTILE = {
    "lists of aliases": (aliases("[x, x]", "[" + ", ".join("*" * 9) + "]"), "aliases stand for more than"),
    "mappings of aliases": (
        aliases("{x: y}", "{" + ", ".join(f"k{n}: *" for n in range(9)) + "}"),
        "aliases stand for more than",
    ),
    "an alias in itself": ("name: &a [*a]", "stands inside of what it names"),
    "an alias of nothing": ("name: *a", "alias"),
    "100,000 brackets": ("name: " + "[" * 100_000, "levels of lists"),  # libyaml overflows the stack
    "100,000 braces": ("{a: " * 100_000, "levels of lists"),
    "400 closed brackets": ("name: " + "[" * 400 + "]" * 400, "levels of lists"),
    "100,000 dashes": ("- " * 100_000, "levels of lists"),
    "no UTF-8": (b"name: \xff\xfe", "utf-8"),
    "a zero byte": ("name: \0", "control characters"),
    "a key that is a list": ("? [a, b]\n: 1", "unhashable key"),
    "an object of Python": ("name: !!python/object/apply:os.system [true]", "python/object/apply"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(("load", "error"), [(load_catalog, CatalogError), (load_recipe, RecipeError)])
@pytest.mark.timeout(10)
def test_hostile_yaml_is_one_short_error(
    tmp_path: Path, kind: str, load: Callable[[str], Any], error: type[Exception]
) -> None:
    content, reason = HOSTILE[kind]
    (tmp_path / "own.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=reason) as caught:
        load(str(tmp_path / "own.yaml"))
    assert "own.yaml" in str(caught.value) and len(str(caught.value)) < 500


def test_a_recipe_s_mixture_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: {mixture: mixture.yaml}")
    (tmp_path / "mixture.yaml").write_text(HOSTILE["lists of aliases"][0])
    with pytest.raises(RecipeError, match="aliases stand for more than"):
        load_recipe(tmp_path / "own.yaml")


@pytest.mark.parametrize("text", ["9" * 5000, "2024-99-99"])
def test_a_catalog_with_a_value_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.yaml").write_text(f"name: {text}")
    with pytest.raises(CatalogError, match=r"own\.yaml"):
        load_catalog(str(tmp_path / "own.yaml"))


def test_the_limits_are_those_that_are_named() -> None:
    values = MAX_NODES // 10 - 4
    text = f"a: &a [{', '.join('x' * values)}]\nb: [{', '.join(['*a'] * 9)}]\n"
    check_yaml(text)
    with pytest.raises(yaml.YAMLError, match="aliases"):
        check_yaml(text + "c: *a\n")
    check_yaml("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    with pytest.raises(yaml.YAMLError, match="levels"):
        check_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
