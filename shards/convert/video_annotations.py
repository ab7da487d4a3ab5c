"""Converters of captions, points and tracks on videos. Times are seconds from the start of the clip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shards.catalog.converters import VideoCaptionOptions, VideoPointsOptions, VideoTrackOptions
from shards.convert.common import (
    SCALES,
    Group,
    Omitted,
    of_variants,
    packed_points,
    pick,
    require_annotations,
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

GRID_REACH = 0.01  # seconds; a frame this close to the grid of answer times counts as on it


def video_caption(group: Group, options: VideoCaptionOptions) -> Iterator[Example | Omitted]:
    """Convert a video, or its clip from `start` to `end`, with captions; fields named "video_…" are caption styles."""
    least, score = options.min_score, group.get("score")
    if least is not None and score is not None and score < least:
        yield group.omit(f"annotation score below {least:g}: {score}")
        return
    styles = [field for field in group.row.columns if field.startswith("video_")]
    captions = {style: text_of(group.get(style)) for style in styles}
    annotations = [Text(style=style, answer=caption) for style, caption in captions.items() if caption]
    require_annotations(annotations, "no caption")
    video = group.media.video(group.text("video"), group.get("start"), group.get("end"), group.values[0])
    yield group.example(annotations, video=video)


def video_points(group: Group, options: VideoPointsOptions) -> Iterator[Example | Omitted]:
    """Convert one video with points per label in some of its frames; a label's style is drawn for each text variant.

    The rows of each clip of the video make one example. A clip (or a whole video with a field `duration`) longer than
    `options.max_seconds` is left out, because all its frames must fit a sample.
    """
    most, styles, longest = options.max_points, options.styles, options.max_seconds
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
        label = group.text("label", index)
        plain = Points(
            style="",
            label=label.lower() if options.lower_labels else label,
            groups=_point_groups(group, options, index, start or 0.0),
        )
        drawn = []
        for style in (pick(styles, rng) for rng in group.generators(str(index))):
            question = text_of(group.get("question", index)) if style == "video_point_count" else ""
            drawn.append(replace(plain, style=style, question=question))
        points = of_variants(drawn)
        if points.label and points.count <= most:
            clips.setdefault((start, end), []).append(points)
        else:
            yield group.omit(f"more than {most} points: {points.count}" if points.label else "no label", index)
    for number, ((start, end), labels) in enumerate(clips.items()):
        video = group.media.video(group.text("video"), start, end, group.values[0])
        for part, run in enumerate(packed_points(labels, most)):
            yield group.example(run, video=video, suffix=f"-{number}-{part}")


def _point_groups(group: Group, options: VideoPointsOptions, index: int, start: float) -> tuple[PointGroup, ...]:
    times, frames = group.get("times", index) or (), group.get("points", index) or ()
    if len(times) != len(frames):
        raise RejectedError(f"{len(times)} timestamps and {len(frames)} frames of points")
    scale = _frame_size(group, index) if options.scale == "pixel" else SCALES[options.scale]
    by_time: dict[float, tuple[tuple[float, float], ...]] = {}
    for time, points in zip(times, frames, strict=True):  # a time may occur several times, with one point each
        at = float(time) - start
        by_time[at] = by_time.get(at, ()) + to_fractions(xy_pairs(points), scale)
    return tuple(PointGroup(at=at, points=by_time[at]) for at in sorted(by_time) if by_time[at])


def _frame_size(group: Group, index: int = 0) -> tuple[float, float]:
    return float(group.get("width", index)), float(group.get("height", index))


def video_track(group: Group, options: VideoTrackOptions) -> Iterator[Example | Omitted]:
    """Convert one video with tracked objects, in pixels of `width` x `height`; occluded points are left out.

    The field `frames` has the points frame by frame; the field `objects` has them object by object, with a point or
    null for each frame. Answers are given at `sampling_fps` (or `options.sampling_fps`) per second, and only for frames
    within 0.01 s of that grid, as in Molmo2. For a video stored as images see `_image_rate`.
    """
    scale = _frame_size(group)
    rate = float(options.sampling_fps or group.get("sampling_fps"))
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
        style=options.style,
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
    """Yield the time of each frame in seconds, and the visible objects in it: number and point (pixels)."""
    for frame in group.get("frames") or ():
        points = [point for point in frame["points"] or () if point["point"] and not point["occluded"]]
        yield float(frame["time"]), [(int(point["id"]), point["point"]) for point in points]
    objects = [track["points"] or () for track in group.get("objects") or ()]
    for number in range(max(map(len, objects), default=0)):
        visible = [(place, points[number]) for place, points in enumerate(objects) if number < len(points)]
        yield number / float(group.get("fps")), [(place, point) for place, point in visible if point]


def _image_rate(group: Group) -> float | None:
    """Frame rate of a video stored as images, in the time base of the annotations; None if no field gives it.

    The field `image_fps` gives the rate directly. With `native_fps`, every n-th image is annotated, n being
    `native_fps` / `fps` rounded, and annotated frame k has the time k / `fps`. So the rate is n x `fps`: 24 if the
    camera recorded 25 images per second and 6 of them are annotated.

    Raises:
        RejectedError: the native rate of this video is missing.
    """
    if group.maps("native_fps"):
        native, fps = group.get("native_fps"), float(group.get("fps"))
        if not native:
            raise RejectedError(f"no native frame rate of {group.text('video')} in {group.row.columns['native_fps']}")
        return fps * max(1, round(float(native) / fps))
    images = group.get("image_fps")
    return float(images) if images else None
