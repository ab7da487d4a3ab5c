"""Images: which tiling an image gets, and its pixels at the exact sizes a shard stores.

The aspect ratio is not kept and nothing is padded: the view and every canvas are plain resizes of the whole image.
Cutting a canvas into crops is `shards.layout.split_crops`, on the loader's side.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from shards.layout import VisualLayout

Pixels = npt.NDArray[np.uint8]


@functools.lru_cache(maxsize=64)
def _candidates(max_crops: int) -> npt.NDArray[np.int64]:
    """All (rows, cols) of at most `max_crops` tiles; few tiles first, then few rows."""
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    return np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])))


@functools.lru_cache(maxsize=4096)
def choose_tiling(layout: VisualLayout, height: int, width: int, max_crops: int) -> tuple[int, int]:
    """The (rows, cols) of crops whose canvas needs the least upscaling, or the least downscaling if all shrink it.

    The canvas border (the overlap margins) is taken off the image before comparing; a side shorter than the border
    counts as one pixel. Ties go to the tiling with fewer tiles, then fewer rows.
    """
    window = layout.window_patches * layout.patch_size
    border = 2 * layout.overlap_margin * layout.patch_size
    inner = np.array([max(height - border, 1), max(width - border, 1)], np.float32)
    candidates = _candidates(max_crops)
    # float32 on purpose: the official rule compares in float32, and near-ties must fall the same way
    scales = ((candidates * window).astype(np.float32) / inner).min(axis=1)
    best = int(scales.argmax()) if (scales < 1).all() else int(np.where(scales < 1, np.inf, scales).argmin())
    rows, cols = candidates[best].tolist()
    return rows, cols


def resize(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """Bilinear resize without antialiasing, rounded: equal to transformers' Molmo2 processors to the last bit.

    Args:
        rgb: [H, W, 3] or [T, H, W, 3].
        size: height and width of the result, pixels.
    """
    if rgb.shape[-3:-1] == tuple(size):
        return rgb
    if rgb.ndim == 4:
        return np.stack([resize(frame, size) for frame in rgb])  # one at a time: a clip in float32 is large
    import torch  # here, because only resizing needs it: choosing tilings must not wait for this import

    pixels = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def view(layout: VisualLayout, rgb: Pixels) -> Pixels:
    """The whole image as one crop, [crop, crop, 3]; also what a video frame becomes, [T, crop, crop, 3]."""
    return resize(rgb, (layout.crop_size, layout.crop_size))


def canvas(layout: VisualLayout, rgb: Pixels, tiling: tuple[int, int]) -> Pixels:
    """The image at the size that `tiling` covers, [rows * window + border, cols * window + border, 3]."""
    return resize(rgb, layout.canvas_size(tiling))


def canvas_is_view(tiling: tuple[int, int]) -> bool:
    """Whether canvas and view are the same pixels, so that a shard stores one file for both."""
    return math.prod(tiling) == 1
