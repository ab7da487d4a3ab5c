"""What the parts of `shards.media` share: arrays, facts of a video, the error, and when a video counts as cut short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Make = Callable[[Pixels], Any]
ROUNDING = 1e-3  # seconds; decoders give frame times in float32
MISSING_TAIL = 1.0  # seconds; a time later than this after the last frame's end means that the file is cut short


class MediaError(ValueError):
    """An image or a video that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """Facts of a video, or of the clip that a `VideoRef` cuts out of it: duration in seconds, fps of the stream."""

    duration: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """One thing for each time that was asked for: the frame, uint8 [H, W, 3], or what was made of it."""

    each: list[Any]
    decoder: str

    @property
    def pixels(self) -> Pixels:
        """Frames of one size as one array [T, H, W, 3]."""
        return np.stack(self.each)


def check_end(path: str, end: float, times: npt.NDArray[np.float64]) -> None:
    """Refuse times so late that repeating the last frame would hide that a video is cut short.

    Raises:
        MediaError: such a time.
    """
    if times.max() > end + MISSING_TAIL:
        raise MediaError(f"{path}: ends at {end:.2f} s, a frame at {times.max():.2f} s is wanted: cut short")
