"""Captions, points and tracks on videos. Times are seconds from the start of the clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from shards.convert.common import (
    SCALES,
    Group,
    Omitted,
    at_least_one,
    packed_points,
    rng_of,
    text_of,
    to_fractions,
    xy_pairs,
)
from shards.schema import (
    Example,
    PointGroup,
    Points,
    RejectedError,
    Text,
    TrackGroup,
    Tracks,
)

GRID_REACH = 0.01  # seconds


def video_caption(group: Group) -> Iterator[Example | Omitted]:
    """A video, or its clip from `start` to `end`, with captions; a field whose name begins with "video_" is a style."""
    if (score := group.get("score")) is not None and score < group.option("min_score"):
        yield group.omit(f"annotation score below {group.option('min_score')}: {score}")
        return
    styles = [field for field in group.row.columns if field.startswith("video_")]
    captions = {style: text_of(group.get(style)) for style in styles}
    annotations = [Text(style=style, answer=caption) for style, caption in captions.items() if caption]
    at_least_one(annotations, "no caption")
    video = group.media.video(group.text("video"), group.get("start"), group.get("end"), group.values[0])
    yield group.example(annotations, video=video)


def video_points(group: Group) -> Iterator[Example | Omitted]:
    """One video with labels pointed at in some of its frames; each label gets one of `options.styles`.

    `options.scale` is as for images, "percent" by default; "pixel" is one of the fields `width` x `height`.
    All rows of a clip make one example; rows of other clips of the same video make others. A clip, or a video without
    one whose field `duration` says so, may be `options.max_seconds` long: its frames must all fit a sample.
    """
    most, styles = int(group.option("max_points")), group.option("styles")
    longest = float(group.row.options.get("max_seconds", math.inf))
    clips: dict[tuple[float | None, float | None], list[Points]] = {}
    for index in range(len(group.values)):
        if group.get("unsure", index):
            yield group.omit("the annotator was unsure", index)
            continue
        start, end = group.get("start", index), group.get("end", index)
        whole = end if end is not None else group.get("duration", index)
        if whole is not None and whole - (start or 0.0) > longest:
            yield group.omit(f"{whole - (start or 0.0):.1f} s, at most {longest:g} s", index)
            continue
        style = styles[int(rng_of(f"{group.row.name}/{group.key}/{index}", "style").integers(len(styles)))]
        points = Points(
            style=style,
            label=_label(group, index),
            groups=_point_groups(group, index, start or 0.0),
            question=text_of(group.get("question", index)) if style == "video_point_count" else "",
        )
        if points.label and points.count <= most:
            clips.setdefault((start, end), []).append(points)
        else:
            yield group.omit(f"more than {most} points: {points.count}" if points.label else "no label", index)
    for number, ((start, end), labels) in enumerate(clips.items()):
        video = group.media.video(group.text("video"), start, end, group.values[0])
        for part, run in enumerate(packed_points(labels, most)):
            yield group.example(run, video=video, suffix=f"-{number}-{part}")


def _label(group: Group, index: int = 0) -> str:
    label = group.text("label", index)
    return label.lower() if group.row.options.get("lower_labels") else label


def _point_groups(group: Group, index: int, start: float) -> tuple[PointGroup, ...]:
    times, frames = group.get("times", index) or (), group.get("points", index) or ()
    if len(times) != len(frames):
        raise RejectedError(f"{len(times)} timestamps and {len(frames)} frames of points")
    kind = group.row.options.get("scale", "percent")
    scale = _frame_size(group, index) if kind == "pixel" else SCALES[kind]
    found: dict[float, tuple[tuple[float, float], ...]] = {}
    for time, points in zip(times, frames, strict=True):  # a moment may come several times, with a point each
        at = float(time) - start
        found[at] = found.get(at, ()) + to_fractions(xy_pairs(points), scale)
    return tuple(PointGroup(at=at, points=found[at]) for at in sorted(found) if found[at])


def _frame_size(group: Group, index: int = 0) -> tuple[float, float]:
    return float(group.get("width", index)), float(group.get("height", index))


def video_track(group: Group) -> Iterator[Example | Omitted]:
    """One video with objects followed through its frames, pixels of `width` x `height`; occluded ones are left out.

    The field `frames` has them frame by frame; `objects` object by object, with a point or nothing for each frame.
    Answers are given at `sampling_fps` (or `options.sampling_fps`), and only for frames within 0.01 s of that grid, as
    Molmo2 keeps them. The rate of a video that is a folder of images is that of `_image_rate`.
    """
    scale = _frame_size(group)
    rate = float(group.row.options.get("sampling_fps") or group.get("sampling_fps"))
    if (fps := group.get("fps")) is not None and fps % rate:
        yield group.omit(f"{fps} frames per second are no multiple of {rate:g} answers")
        return
    frames = []
    for time, points in _frames(group):
        if abs(time * rate - round(time * rate)) > GRID_REACH * rate:
            continue
        objects = [(number, *to_fractions(xy_pairs([point]), scale)[0]) for number, point in points]
        if objects:
            frames.append(TrackGroup(time=time, objects=tuple(objects)))
    tracks = Tracks(
        style=str(group.option("style")),
        label=text_of(group.get("label")),
        fps=rate,
        groups=tuple(sorted(frames, key=lambda g: g.time)),
    )
    if not tracks.groups:
        yield group.omit("no object is visible in a frame of the answer")
        return
    video = group.media.video(group.text("video"), row=group.values[0], fps=_image_rate(group))
    yield group.example([tracks], video=video)


def _frames(group: Group) -> Iterator[tuple[float, list[tuple[int, Any]]]]:
    """Seconds of each frame and what is visible in it: number and point (pixels) of objects."""
    for frame in group.get("frames") or ():
        points = [point for point in frame["points"] or () if point["point"] and not point["occluded"]]
        yield float(frame["time"]), [(int(point["id"]), point["point"]) for point in points]
    objects = [one["points"] or () for one in group.get("objects") or ()]
    for number in range(max(map(len, objects), default=0)):
        seen = [(place, points[number]) for place, points in enumerate(objects) if number < len(points)]
        yield number / float(group.get("fps")), [(place, point) for place, point in seen if point]


def _image_rate(group: Group) -> float | None:
    """Images of a folder per second of the annotation's time: the field `image_fps`, None where nothing is mapped.

    With `native_fps` the annotated frames are every n-th image, n being `native_fps` / `fps` rounded, and frame k has
    the time k / `fps`. So the images go by at n x `fps`: 24 where the camera made 25, of which 6 were annotated.

    Raises:
        RejectedError: the native rate of this video is not known.
    """
    if "native_fps" in group.row.columns:
        native, fps = group.get("native_fps"), float(group.get("fps"))
        if not native:
            raise RejectedError(f"no native frame rate of {group.text('video')} in {group.row.columns['native_fps']}")
        return fps * max(1, round(float(native) / fps))
    images = group.get("image_fps")
    return float(images) if images else None
