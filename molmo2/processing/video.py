"""Video: the times at which frames are taken, and the text that tells the model a frame's time.

Pure arithmetic on durations; decoding is `shards.media`. Times are seconds from the start of the clip.
"""

from __future__ import annotations

import math

import numpy as np


def frame_times(duration: float, fps: float, max_frames: int) -> tuple[float, ...]:
    """Molmo2's "uniform_last_frame": a grid at `fps` plus the very end, or `max_frames` evenly when too long.

    The last time is always `duration` (with one exception: `max_frames` = 1 keeps time 0 only).
    """
    if max_frames < 1:
        raise ValueError(f"max_frames = {max_frames}: a video needs at least one frame")
    if max_frames == 1:
        return (0.0,)
    if (max_frames - 1) / fps < duration:
        return tuple(np.linspace(0.0, duration, max_frames).tolist())
    return (*_grid(duration, fps), duration)


def grid_times(duration: float, fps: float, max_frames: int) -> tuple[float, ...]:
    """A grid at `fps`, cut after `max_frames`: keeps annotations made at `fps` on their frames (tracking)."""
    return _grid(duration, fps)[:max_frames] or (0.0,)


def _grid(duration: float, fps: float) -> tuple[float, ...]:
    times = (i / fps for i in range(math.ceil(duration * fps) + 1))
    return tuple(time for time in times if time < duration)


def timestamp(index: int, time: float) -> str:
    """Text before frame number `index`: one decimal, a space after it, and before it except at the first frame."""
    return f"{'' if index == 0 else ' '}{time:.1f} "
