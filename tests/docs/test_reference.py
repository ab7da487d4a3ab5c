"""The reference pages are what the code says.

UPDATE_GOLDEN=1 python -m pytest tests/docs/test_reference.py    # write the pages anew, then read them
"""

import os
import re

import pytest
from docs_reference import DOCS, PAGES

from molmo2.config import Recipe
from shards.catalog.converters import CONVERTER_OPTIONS
from shards.catalog.row import Row


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    page = PAGES[name]()
    if os.environ.get("UPDATE_GOLDEN"):
        (DOCS / name).write_text(page, encoding="utf-8")
    assert (DOCS / name).read_text(encoding="utf-8") == page, "UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name", PAGES)
def test_every_key_has_a_meaning(name: str) -> None:
    rows = [line for line in PAGES[name]().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if re.search(r"\|\s*\|", row)] == []


def test_the_pages_are_complete() -> None:
    converters, catalog, recipe = (PAGES[f"reference-{name}.md"]() for name in ("converters", "catalog", "recipe"))
    assert all(f"\n## {name}\n" in converters for name in CONVERTER_OPTIONS)
    assert all(f"\n| `{key}` | " in catalog for key in Row.model_fields)
    assert all(f"\n| `{key}` | " in recipe for key in Recipe.model_fields)
