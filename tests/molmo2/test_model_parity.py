"""Our model against transformers' Molmo2: logits, and gradients of a loss, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, pair

from molmo2.hub import from_foreign
from molmo2.model.config import ModelConfig
from molmo2.model.mask import PAD_SEGMENT, TRUNK, allowed
from molmo2.processing.processor import visual_layout
from shards import layout as geometry

TOLERANCE = 1e-5
Visual = dict[str, Any]


def build(config: ModelConfig, members: list[tuple[list[Visual], list[int]]]) -> dict[str, torch.Tensor]:
    """A packed row of (visuals, lengths of its branches) with random text and pixels, as the loader lays it out."""
    layout, rng = visual_layout(config), np.random.default_rng(0)
    ids, segments, positions, pooling, crops = [], [], [], [], 0
    for number, (visuals, branches) in enumerate(members):
        trunk = [1]
        for visual in visuals:
            trunk += [*rng.integers(0, 300, 2), *geometry.visual_tokens(layout, visual)]
            local = geometry.visual_pooling(layout, visual)
            pooling.append(np.where(local >= 0, local + crops * config.patches_per_crop, -1))
            crops += geometry.visual_crops(visual)
        ids += trunk
        segments += [number * 100_000 + TRUNK] * len(trunk)
        positions += range(len(trunk))
        for branch, length in enumerate(branches):
            ids += rng.integers(0, 300, length).tolist()
            segments += [number * 100_000 + branch + 1] * length
            positions += range(len(trunk), len(trunk) + length)
    width = max((p.shape[1] for p in pooling), default=4)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in pooling]
    input_ids = torch.tensor([[int(i) for i in ids]])
    return {
        "input_ids": input_ids,
        "position_ids": torch.tensor([positions]),
        "segment_ids": torch.tensor([segments], dtype=torch.int32),
        "is_visual": torch.isin(input_ids, torch.tensor(layout.tokens.bidirectional)),
        "pixels": torch.from_numpy(rng.integers(0, 256, (crops, config.crop_size, config.crop_size, 3), np.uint8)),
        "pooling": torch.from_numpy(np.concatenate(padded)) if padded else torch.zeros((0, 4), dtype=torch.int64),
    }


def image(rows: int, cols: int) -> Visual:
    return {"kind": "image", "tiling": (rows, cols)}


CASES: dict[str, list[tuple[list[Visual], list[int]]]] = {
    "text": [([], [12])],
    "image": [([image(2, 2)], [9])],
    "several images": [([image(1, 1), image(1, 3), image(2, 1)], [9])],
    "video": [([{"kind": "frame"}] * 6, [9])],
    "packed tree": [([image(1, 2)], [5, 7]), ([], [6]), ([image(1, 1)], [4, 4, 4])],
}


def reference_logits(reference: Any, config: ModelConfig, row: dict[str, torch.Tensor], visuals: list[Visual]) -> Any:
    """Transformers' logits; packed rows go in with a 4-D mask, which is all that it offers for them."""
    size, patch = config.crop_size // config.patch_size, config.patch_size
    inputs: dict[str, Any] = {"input_ids": row["input_ids"], "mm_token_type_ids": row["is_visual"].long()}
    inputs["position_ids"] = row["position_ids"]
    mask = allowed(row["segment_ids"], row["is_visual"])
    inputs["attention_mask"] = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    pixels = row["pixels"].unflatten(1, (size, patch)).unflatten(3, (size, patch)).transpose(2, 3)
    pixels = (pixels.reshape(len(pixels), size * size, patch * patch * 3).float() / 255 - 0.5) / 0.5
    if visuals and visuals[0]["kind"] == "frame":
        side = -(-size // config.video_pool)
        grids = torch.tensor([[len(visuals), side, side]])
        inputs |= {"pixel_values_videos": pixels, "video_token_pooling": row["pooling"], "video_grids": grids}
    elif visuals:
        low = -(-size // 2)
        window, margin = size - 2 * config.overlap_margin, 2 * config.overlap_margin
        grids = [[low, low, *(-(-(window * t + margin) // 2) for t in visual["tiling"])] for visual in visuals]
        inputs |= {"pixel_values": pixels, "image_token_pooling": row["pooling"], "image_grids": torch.tensor(grids)}
        inputs["image_num_crops"] = torch.tensor([geometry.visual_crops(visual) for visual in visuals])
    return reference(**inputs).logits


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, variant: str) -> None:
    config = CONFIGS[variant]
    reference, ours = pair(config)
    row = build(config, CASES[case])
    visuals = [visual for member, _ in CASES[case] for visual in member]
    expected = reference_logits(reference, config, row, visuals)
    logits = ours(**row)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    labels = torch.arange(logits.shape[1]) % config.text.vocab_size
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output[0], labels).backward()
    own = dict(ours.named_parameters())
    theirs = {name: (lambda p=p: p.grad) for name, p in reference.named_parameters() if p.grad is not None}
    reached = {name: p.shape for name, p in own.items() if visuals or not name.startswith(("vit.", "connector."))}
    for name, gradient in from_foreign(reached, theirs).items():
        assert gradient.any() or (name == "text.embedding.added" and not visuals), name
        torch.testing.assert_close(
            own[name].grad, gradient, atol=TOLERANCE, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_branch_is_as_if_it_were_alone() -> None:
    config = CONFIGS["qwen3"]
    _, ours = pair(config)
    row = build(config, [([image(1, 2)], [5, 7])])
    both = ours(**row)
    segment = row["segment_ids"][0]
    alone = {name: value[:, (segment != 1).nonzero()[:, 0]] for name, value in row.items() if value.shape[:1] == (1,)}
    single = ours(**{**row, **alone})
    torch.testing.assert_close(single[0, -7:], both[0, -7:], atol=TOLERANCE, rtol=0)


def test_padding_changes_nothing() -> None:
    config = CONFIGS["qwen3"]
    _, ours = pair(config)
    row = build(config, [([image(1, 1)], [5])])
    pad = torch.nn.functional.pad
    padded = {
        "input_ids": pad(row["input_ids"], (0, 3)),
        "position_ids": pad(row["position_ids"], (0, 3)),
        "segment_ids": pad(row["segment_ids"], (0, 3), value=PAD_SEGMENT),
        "is_visual": pad(row["is_visual"], (0, 3)),
    }
    length = row["input_ids"].shape[1]
    torch.testing.assert_close(ours(**{**row, **padded})[:, :length], ours(**row), atol=TOLERANCE, rtol=0)
