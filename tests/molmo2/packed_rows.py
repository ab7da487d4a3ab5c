"""Packed rows of random text and pixels, and what transformers' Molmo2 makes of them, for tests of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from molmo2.model.mask import TRUNK, allowed
from molmo2.model.presets import ModelConfig
from molmo2.processing.contract import visual_layout
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


CASES: dict[str, list[tuple[list[Visual], list[int]]]] = {
    "text": [([], [12])],
    "image": [([image(2, 2)], [9])],
    "several images": [([image(1, 1), image(1, 3), image(2, 1)], [9])],
    "video": [([{"kind": "frame"}] * 6, [9])],
    "packed tree": [([image(1, 2)], [5, 7]), ([], [6]), ([image(1, 1)], [4, 4, 4])],
}
