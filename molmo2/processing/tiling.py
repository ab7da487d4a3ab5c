"""Tiling of images: the choice of a tiling, and the resized view and canvas that a shard stores.

The aspect ratio is not kept and nothing is padded: the view and every canvas are plain resizes of the whole image.
`shards.layout.split_crops` cuts a canvas into crops when the loader reads it.
"""

from __future__ import annotations

import functools
import math
import mmap

import numpy as np
import numpy.typing as npt

from shards.layout import VisualLayout

Pixels = npt.NDArray[np.uint8]
LARGE = 50_000_000  # bytes of an image that is resized without holding all of it as floats


@functools.lru_cache(maxsize=64)
def _candidates(max_crops: int) -> npt.NDArray[np.int64]:
    """All (rows, cols) of at most `max_crops` tiles; few tiles first, then few rows."""
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    return np.array(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0])))


@functools.lru_cache(maxsize=4096)
def choose_tiling(layout: VisualLayout, height: int, width: int, max_crops: int) -> tuple[int, int]:
    """The (rows, cols) of crops whose canvas needs the least upscaling, or the least downscaling if all downscale.

    The canvas border (the overlap margins) is subtracted from the image's size first; a side shorter than the border
    counts as one pixel. Of equally good tilings the one with fewer tiles is taken, then the one with fewer rows.
    """
    window = layout.window_patches * layout.patch_size
    border = 2 * layout.overlap_margin * layout.patch_size
    inner = np.array([max(height - border, 1), max(width - border, 1)], np.float32)
    candidates = _candidates(max_crops)
    # The official rule compares in float32, so float32 is needed to decide near-ties alike.
    scales = ((candidates * window).astype(np.float32) / inner).min(axis=1)
    best = int(scales.argmax()) if (scales < 1).all() else int(np.where(scales < 1, np.inf, scales).argmin())
    rows, cols = candidates[best].tolist()
    return rows, cols


def resize(rgb: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize bilinearly without antialiasing, and round; bit-identical to transformers' Molmo2 processors.

    Args:
        rgb: [H, W, 3] or [T, H, W, 3].
        size: height and width of the result, pixels.
    """
    if rgb.shape[-3:-1] == tuple(size):
        return rgb
    if rgb.ndim == 4:
        return np.stack([resize(frame, size) for frame in rgb])  # one at a time, since a clip in float32 is large
    import torch  # imported here, so that choosing tilings does not need torch

    source = rgb.astype(np.float32) if rgb.size < LARGE else _rows_between(rgb, size[0])
    pixels = torch.from_numpy(source).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def _rows_between(rgb: Pixels, height: int) -> npt.NDArray[np.float32]:
    """An image as floats, with only those rows between which the `height` rows of a bilinear resize lie; others are 0.

    Pages of zeros that are never written take no memory, so a large image is not held as floats.
    """
    places = (np.arange(height) + 0.5) * (len(rgb) / height) - 0.5
    reach = 0.1 + len(rgb) / 2**20  # torch computes these places in float32
    near = np.floor(places - reach)[:, None] + np.arange(int(2 * reach) + 3)
    rows = np.unique(near.clip(0, len(rgb) - 1).astype(int))
    memory = mmap.mmap(-1, 4 * rgb.size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page has several rows, and is in memory if one is written
    source = np.frombuffer(memory, np.float32).reshape(rgb.shape)
    source[rows] = rgb[rows]
    return source


def view(layout: VisualLayout, rgb: Pixels) -> Pixels:
    """The whole image resized to one crop, [crop, crop, 3]; for video frames [T, crop, crop, 3]."""
    return resize(rgb, (layout.crop_size, layout.crop_size))


def canvas(layout: VisualLayout, rgb: Pixels, tiling: tuple[int, int]) -> Pixels:
    """The image at the size that `tiling` covers, [rows * window + border, cols * window + border, 3]."""
    return resize(rgb, layout.canvas_size(tiling))


def canvas_is_view(tiling: tuple[int, int]) -> bool:
    """Whether canvas and view are the same pixels, so that a shard stores one file for both."""
    return math.prod(tiling) == 1
