"""The model before the first step: what a rank holds of it, at its peak too; all ranks have the same weights."""

import json
from pathlib import Path

import memory_cases
import pytest
import torch
from memory_cases import Start
from ranks import run_ranks

from molmo2.model.molmo2 import Molmo2
from molmo2.weights.names import hub_config, write_hub

pytestmark = pytest.mark.dist
SLACK = 8 << 20  # bytes that the allocator and DeepSpeed's buffers may take


def test_a_rank_holds_its_part_in_the_precision_of_the_run_and_little_more_at_its_peak(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in Molmo2(memory_cases.CONFIG).parameters()]
    write_hub(dict(Molmo2(memory_cases.CONFIG).random_weights(0)), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hub_config(memory_cases.CONFIG)))
    number, largest = sum(shape.numel() for shape in shapes), max(shape.numel() for shape in shapes)
    starts = [Start("fp32", 3), Start("bf16", 3), Start("bf16", 2), Start("bf16", 2, str(tmp_path))]
    held = [number * 4 // 2, number * 2 // 2, number * 2, number * 2]
    ranks = run_ranks(2, memory_cases.place_all, starts)
    for start, expected, *placed in zip(starts, held, *ranks, strict=True):
        for rank, found in enumerate(placed):
            assert found.held == pytest.approx(expected, rel=0.01), (start, rank)
            # At once: the parameter read in float32, its copy in the precision of the run, and what is sent of it.
            assert found.peak < expected + 3 * 4 * largest + SLACK, (start, rank, found.peak / 2**20)
        assert placed[0].total == placed[1].total != 0 or start.zero_stage == 3
    assert ranks[0][2].total == ranks[0][3].total
    exact = sum(tensor.double().sum().item() for _, tensor in Molmo2(memory_cases.CONFIG).random_weights(0))
    assert ranks[1][0].total == pytest.approx(exact, abs=1e-3)
