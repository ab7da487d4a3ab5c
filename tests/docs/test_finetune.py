"""The figures of docs/finetune.md are those of `--dry-run`."""

import re
from pathlib import Path

import pytest
import torch

from molmo2.config import load_recipe
from molmo2.model.presets import PRESETS
from molmo2.training.dry_run import GIB, measure_saved, memory

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/finetune.md").read_text()
CASES = {
    "all weights, base embedding frozen": ("stage2.yaml", [], (1, 8)),
    "connector and language model": ("stage2.yaml", ["train.freeze=[vit]"], (1, 8)),
    "connector and adapters": ("lora.yaml", [], (1,)),
}


@pytest.mark.slow
def test_the_table_has_the_estimates() -> None:
    kept = measure_saved(PRESETS["4b"], torch.bfloat16)
    for name, (recipe, overrides, worlds) in CASES.items():
        (row,) = re.findall(rf"^\| {name} \|.*", PAGE, re.MULTILINE)
        loaded = load_recipe(ROOT / "recipes" / recipe, overrides)
        expected = [round(sum(memory(loaded, world, kept).values()) / GIB) for world in worlds]
        assert [int(number) for number in re.findall(r"(\d+) (?:GiB )?on \d", row)] == expected, row
