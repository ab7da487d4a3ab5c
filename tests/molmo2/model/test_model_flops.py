"""Counted operations against torch's own counter, and allowed pairs against the mask written out."""

from __future__ import annotations

import pytest
import torch
from packed_rows import build, image
from tiny_models import CONFIGS, QWEN
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from molmo2.model.flops import (
    TRAINING_FACTOR,
    Flops,
    Workload,
    forward_flops,
    step_flops,
    training_flops,
    unit_costs,
)
from molmo2.model.mask import PAD_SEGMENT, allowed
from molmo2.model.molmo2 import Molmo2
from molmo2.model.pairs import attention_pairs
from molmo2.model.presets import PRESETS

PACKED = [([image(1, 2)], [5, 7]), ([], [6]), ([{"kind": "frame"}] * 2, [4, 4, 4])]


@pytest.fixture(autouse=True)
def counted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by matrix products: torch's counter does not know the CPU's fused kernel."""
    monkeypatch.setattr("molmo2.model.attention.KERNELS", [SDPBackend.MATH])


@pytest.mark.parametrize("variant", CONFIGS)
def test_equal_to_torchs_counter(variant: str) -> None:
    config = CONFIGS[variant]
    model, row = Molmo2(config).init_weights(0), build(config, PACKED)
    tokens = row["input_ids"].shape[1]
    work = Workload(
        num_crops=len(row["pixels"]),
        num_visual_tokens=len(row["pooling"]),
        pool_width=row["pooling"].shape[1],
        num_tokens=tokens,
        num_pairs=tokens**2,  # a dense kernel computes all of them
        num_logits=tokens,
    )
    counted = forward_flops(config, work)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(**row)
    parts = {name.split(".")[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    # The connector's attention is written as sums of products, which torch's counter does not count.
    products = 4 * work.num_visual_tokens * work.pool_width * config.connector.hidden_size
    assert (counted.vit, counted.connector) == (parts["vit"], parts["connector"] + products)
    assert counted.llm == parts["text"] + parts["lm_head"]
    assert counted.total == counter.get_total_flops() + products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    pixels = 2 * row["pixels"].numel() * config.vit.hidden_size  # nothing flows back into the pixels
    assert counter.get_total_flops() == (TRAINING_FACTOR - 1) * (counted.total - products) - pixels


@pytest.mark.parametrize("frozen", [("vit",), ("llm",), ("vit", "connector"), ("vit", "llm")])
def test_a_frozen_component_takes_fewer_operations(frozen: tuple[str, ...]) -> None:
    model, row = Molmo2(QWEN).init_weights(0), build(QWEN, PACKED)
    model.freeze(frozen)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(**row)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    parts = {name.split(".")[-1]: sum(ops.values()) for name, ops in forward.get_flop_counts().items()}
    counted = Flops(vit=parts["vit"], connector=parts["connector"], llm=parts["text"] + parts["lm_head"])
    both = forward.get_total_flops() + backward.get_total_flops()
    assert training_flops(counted, frozen).total == pytest.approx(both, rel=0.1)
    assert both < 0.9 * training_flops(counted).total


@pytest.mark.parametrize("frozen", [(), ("vit",), ("llm",)])
@pytest.mark.parametrize("level", ["none", "light", "full"])
def test_a_pack_costs_the_sum_of_its_units(frozen: tuple[str, ...], level: str) -> None:
    """Exactly for frames and text that is all predicted; nearly for images and prompts."""
    config, tokens, pairs = PRESETS["4b"], 16_384, 10**8

    def close(crops: int, visual: int, width: int, logits: int) -> float:
        work = Workload(
            num_crops=crops,
            num_visual_tokens=visual,
            pool_width=width,
            num_tokens=tokens,
            num_pairs=pairs,
            num_logits=logits,
        )
        token, crop, pair = unit_costs(config, frozen, level)
        true = step_flops(config, work, frozen, level)
        return (token * tokens + crop * crops + pair * pairs) / true

    assert close(crops=100, visual=8_100, width=9, logits=tokens - 8_100) == 1
    assert close(crops=90, visual=90 * 150, width=4, logits=800) == pytest.approx(1, abs=0.05)
    assert close(crops=0, visual=0, width=4, logits=tokens // 2) == pytest.approx(1, abs=0.1)


def test_pairs_are_those_of_the_mask() -> None:
    rows = [build(QWEN, members) for members in (PACKED, PACKED[:1], PACKED[1:2])]
    longest = max(row["input_ids"].shape[1] for row in rows)
    padding = [longest - row["input_ids"].shape[1] for row in rows]
    pad = torch.nn.functional.pad
    segments = [pad(row["segment_ids"], (0, n), value=PAD_SEGMENT) for row, n in zip(rows, padding, strict=True)]
    visual = [pad(row["is_visual"], (0, n)) for row, n in zip(rows, padding, strict=True)]
    batch = torch.cat(segments), torch.cat(visual)
    assert sum(padding) > 0
    assert attention_pairs(*batch) == int(allowed(*batch).sum()) - sum(padding)
    assert attention_pairs(torch.full((1, 4), PAD_SEGMENT), torch.zeros((1, 4), dtype=torch.bool)) == 0
