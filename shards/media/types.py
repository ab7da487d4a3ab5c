"""Types that the modules of `shards.media` share, and the check that a video is not truncated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Make = Callable[[Pixels], Any]
ROUNDING = 1e-3  # seconds; decoders give frame times in float32
MISSING_TAIL = 1.0  # seconds; a time more than this after the last frame's end means that the file is truncated


class MediaError(ValueError):
    """An image or a video cannot be read."""


class TooLargeError(MediaError):
    """An image has more pixels than are decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """Properties of a video or of a clip of it: duration of the clip in seconds; the rest of the whole stream."""

    duration: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """One item per requested time: the frame, uint8 [H, W, 3], or the result of `make`. `decoder`: its name."""

    each: list[Any]
    decoder: str

    @property
    def pixels(self) -> Pixels:
        """The frames as one array [T, H, W, 3]; they must have the same size."""
        return np.stack(self.each)


def check_end(path: str, end: float, times: npt.NDArray[np.float64]) -> None:
    """Check that no time is far behind the end: repeating the last frame would hide that a video is truncated.

    Raises:
        MediaError: a time is more than `MISSING_TAIL` seconds after `end`.
    """
    if times.max() > end + MISSING_TAIL:
        raise MediaError(f"{path}: ends at {end:.2f} s, a frame at {times.max():.2f} s is wanted: cut short")
