"""The model before the first step: what a rank holds of it, at its peak too; all ranks have the same weights."""

import memory_cases
import pytest
import torch
from ranks import run_ranks

from molmo2.model.molmo2 import Molmo2

pytestmark = pytest.mark.dist
SLACK = 8 << 20  # bytes that the allocator and DeepSpeed's buffers may take


def test_a_rank_holds_its_part_in_the_precision_of_the_run_and_little_more_at_its_peak() -> None:
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in Molmo2(memory_cases.CONFIG).parameters()]
    number, largest = sum(shape.numel() for shape in shapes), max(shape.numel() for shape in shapes)
    settings = [("fp32", 3), ("bf16", 3), ("bf16", 2)]
    held = [number * 4 // 2, number * 2 // 2, number * 2]
    ranks = run_ranks(2, memory_cases.place_all, settings)
    for setting, expected, *placed in zip(settings, held, *ranks, strict=True):
        for rank, found in enumerate(placed):
            assert found.held == pytest.approx(expected, rel=0.01), (setting, rank)
            # At once: the parameter drawn in float32, its copy in the precision of the run, and what is sent of it.
            assert found.peak < expected + 3 * 4 * largest + SLACK, (setting, rank, found.peak / 2**20)
        assert placed[0].total == placed[1].total != 0 or setting[1] == 3
    exact = sum(tensor.double().sum().item() for _, tensor in Molmo2(memory_cases.CONFIG).random_weights(0))
    assert ranks[1][0].total == pytest.approx(exact, abs=1e-3)
