"""Sampling of video frames: the times of the frames, the text with a frame's time, and the text of subtitles.

It computes with durations only; decoding is in `shards.media.video`. Times are seconds from the start of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shards.schema import Cue

FRAME_REACH = 0.01  # seconds; an annotation this close to a frame is on it, as in Molmo2
MAX_TRACK_RATE = 10  # frames per second
SUBTITLE_REACH = 1.0  # seconds; a line is included if it overlaps the time from this long before to after a frame


def frame_times(duration: float, fps: float, max_frames: int) -> tuple[float, ...]:
    """Molmo2's "uniform_last_frame": times at `fps` and the end, or `max_frames` times evenly spaced in a long video.

    The last time is always `duration`, except that `max_frames` = 1 gives only time 0.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames = {max_frames}: a video needs at least one frame")
    if max_frames == 1:
        return (0.0,)
    if (max_frames - 1) / fps < duration:
        return tuple(np.linspace(0.0, duration, max_frames).tolist())
    return (*_grid(duration, fps), duration)


def track_times(duration: float, video_fps: int, max_frames: int) -> tuple[float, ...]:
    """Molmo2's times of a video with tracks: a constant rate from the start, and no frame for the end.

    The rate is the largest of 1 to 10 per second that divides the video's own and with which `max_frames` reach the
    end; a clip that is too long for 1 per second is cut. Tracks are annotated on frames of the video, so that each
    sampled frame is one of them. The rule is that of the released code; the paper says 2 per second.
    """
    rates = [rate for rate in range(1, MAX_TRACK_RATE + 1) if video_fps % rate == 0]
    rate = max((rate for rate in rates if max_frames / rate >= duration), default=1)
    return _grid(duration, rate)[:max_frames] or (0.0,)


def _grid(duration: float, fps: float) -> tuple[float, ...]:
    times = (i / fps for i in range(math.ceil(duration * fps) + 1))
    return tuple(time for time in times if time < duration)


def timestamp(index: int, time: float) -> str:
    """The text before frame `index`: the time with one decimal, a space after it and, but for frame 0, before it."""
    return f"{'' if index == 0 else ' '}{time:.1f} "


def subtitle_text(cues: Sequence[Cue], times: Sequence[float]) -> str:
    """The heading of subtitles and those around the frames at `times`, one line per cue, to follow all frames."""
    lines = []
    for cue in cues:
        if cue.start is None or cue.end is None:
            lines.append(f"{cue.text}\n")
        elif any(cue.start <= time + SUBTITLE_REACH and cue.end >= time - SUBTITLE_REACH for time in times):
            lines.append(f"{cue.start:.1f} - {cue.end:.1f} {cue.text}\n")
    return "subtitle\n" + "".join(lines)
