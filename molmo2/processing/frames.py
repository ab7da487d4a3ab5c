"""Video: the times at which frames are taken, and the texts that tell the model a frame's time and what is said.

Pure arithmetic on durations; decoding is `shards.media.video`. Times are seconds from the start of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shards.schema import Cue

SUBTITLE_REACH = 1.0  # seconds: a line is shown if it overlaps this much time around some frame


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


def subtitle_text(cues: Sequence[Cue], times: Sequence[float]) -> str:
    """What is said around the frames at `times`, a line per cue: the text after all frames, "" if there is none."""
    lines = []
    for cue in cues:
        if cue.start is None or cue.end is None:
            lines.append(f"{cue.text}\n")
        elif any(cue.start <= time + SUBTITLE_REACH and cue.end >= time - SUBTITLE_REACH for time in times):
            lines.append(f"{cue.start:.1f} - {cue.end:.1f} {cue.text}\n")
    return "subtitle\n" + "".join(lines) if lines else ""
