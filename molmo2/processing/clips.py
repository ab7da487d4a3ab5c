"""Points in a video of which not all frames fit: which part of the video to take.

A point is true of one moment, so it is not moved to another frame. A part of the video that all its frames fit keeps
points where they are. Which frames fit is decided by the processor, and times are those of `molmo2.processing.frames`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shards.schema import Annotation, Example, PointGroup, Points, VideoRef

POINT_ONLY = "video_point"  # style of points that are no longer all points of the object, so that none are counted


def points_of(example: Example) -> list[PointGroup]:
    """The points of all annotations."""
    return [
        group for annotation in example.annotations if isinstance(annotation, Points) for group in annotation.groups
    ]


def richest_part(
    points: list[PointGroup], duration: float, length: float, fps: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Start and end of a part of `length` seconds with the most points; a random one of those, on the grid of `fps`."""
    at = np.array([group.at for group in points])
    weight = np.array([len(group.points) for group in points])
    starts = np.arange(0, max(0.0, duration - length) * fps + 1e-6) / fps
    inside = (at >= starts[:, None] - 1e-6) & (at <= starts[:, None] + length + 1e-6)
    found = inside @ weight
    start = float(rng.choice(starts[found == found.max()]))
    return start, min(start + length, duration)


def cut(example: Example, start: float, end: float) -> Example:
    """The example with its video, points and subtitles from `start` to `end` (seconds of its clip).

    A question whose points do not all lie in the part no longer asks for their number.
    """
    assert example.video is not None
    first = (example.video.start or 0.0) + start
    annotations = tuple(_cut_annotation(annotation, start, end) for annotation in example.annotations)
    cues = tuple(
        cue if cue.start is None or cue.end is None else replace(cue, start=cue.start - start, end=cue.end - start)
        for cue in example.subtitles or ()
    )
    video: VideoRef = replace(example.video, start=first, end=first + end - start)
    subtitles = None if example.subtitles is None else cues
    return replace(example, video=video, annotations=annotations, subtitles=subtitles)


def _cut_annotation(annotation: Annotation, start: float, end: float) -> Annotation:
    if not isinstance(annotation, Points):
        return annotation
    kept = [group for group in annotation.groups if start - 1e-6 <= group.at <= end + 1e-6]
    whole = len(kept) == len(annotation.groups)
    return replace(
        annotation,
        style=annotation.style if whole else POINT_ONLY,
        question=annotation.question if whole else "",
        groups=tuple(replace(group, at=group.at - start) for group in kept),
        other_variants=tuple(_cut_annotation(other, start, end) for other in annotation.other_variants),
    )
