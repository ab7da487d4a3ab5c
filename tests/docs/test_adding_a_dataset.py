"""docs/adding-a-dataset.md: its row and its fixture become what the page shows."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import catalog_cases
import pytest
import yaml

from shards.catalog import Row
from shards.convert import CONVERTERS

PAGE = (Path(__file__).parents[2] / "docs/adding-a-dataset.md").read_text(encoding="utf-8")


def test_the_example_is_built_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, fixture = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    small = catalog_cases.catalog().model_copy(update={"rows": (Row.model_validate(row),)})
    monkeypatch.setattr(catalog_cases, "catalog", lambda: small)
    monkeypatch.setattr(catalog_cases, "fixtures", lambda: fixture)
    found = catalog_cases.rendered(row["name"], "sft", tmp_path)
    (shown,) = re.findall(r"(?:^    ==.*\n(?:    .*\n)+)", PAGE, re.MULTILINE)
    assert textwrap.dedent(shown) in found
    assert "left out: data/train-00000-of-00004.parquet row 1: filter: language is 'fr'" in found


def test_every_converter_is_named() -> None:
    assert set(CONVERTERS) <= set(re.findall(r"`(\w+)`", PAGE))
