"""Converters of captions, points and tracks on videos. Times are seconds from the start of the clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shards.catalog.converters import VideoCaptionOptions, VideoPointsOptions, VideoTrackOptions
from shards.convert.common import (
    SCALES,
    Group,
    Omitted,
    of_variants,
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

POINT_GRID = 0.5  # seconds; points are annotated on frames at this distance, also where a clip starts between two


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
    """Convert videos with points per label in some of their frames; a label's style is drawn for each text variant.

    Molmo2's rules: a video of at most `options.max_seconds` is shown whole, and all its rows make one example; of a
    longer one the clip that its row names is shown, and each row makes an example. A clip that is too long, or that
    some of its points lie outside of, is left out. A row without points says that there are none anywhere, so that its
    clip must begin with the video and be as long as allowed.
    """
    together: list[Points] = []
    for index in range(len(group.values)):
        if group.get("unsure", index):
            yield group.omit("the annotator was unsure", index)
            continue
        clip = _clip(group, options, index)
        if isinstance(clip, str):
            yield group.omit(clip, index)
            continue
        start, end = clip
        label = group.text("label", index)
        plain = Points(
            style="",
            label=label.lower() if options.lower_labels else label,
            groups=_point_groups(group, options, index, start or 0.0),
        )
        drawn = []
        for style in (pick(options.styles, rng) for rng in group.generators(str(index))):
            question = text_of(group.get("question", index)) if style == "video_point_count" else ""
            drawn.append(replace(plain, style=style, question=question))
        points = of_variants(drawn)
        if not points.label:
            yield group.omit("no label", index)
        elif points.count > options.max_points:
            yield group.omit(f"more than {options.max_points} points: {points.count}", index)
        elif start is None and end is None:
            together.append(points)
        else:
            video = group.media.video(group.text("video", index), start, end, group.values[index])
            yield group.example([points], video=video, suffix=f"-{index}")
    if together:
        video = group.media.video(group.text("video"), row=group.values[0])
        yield replace(group.example(together, video=video), multi_turn=options.multi_turn)


def _clip(group: Group, options: VideoPointsOptions, index: int) -> tuple[float | None, float | None] | str:
    """Start and end of a row's clip in its video (None: those of the video), or why the row is left out."""
    start, end, whole = (group.get(field, index) for field in ("start", "end", "duration"))
    longest = options.max_seconds
    if whole is not None and whole <= longest:
        start = end = None
    first, last = start or 0.0, whole if end is None else end
    if last is not None and last - first > longest:
        return f"{last - first:.1f} s, at most {longest:g} s"
    times = [float(time) for time in group.get("times", index) or ()]
    if not times and whole is not None and last is not None and (first > 0 or last < min(whole, longest)):
        return "no such object, but a clip that is not the beginning of its video"
    if times and (min(times) < first or (last is not None and max(times) > last)):
        return f"points from {min(times):g} to {max(times):g} s in a clip from {first:g} s to {last or math.inf:g} s"
    return start, end


def _point_groups(group: Group, options: VideoPointsOptions, index: int, start: float) -> tuple[PointGroup, ...]:
    times, frames = group.get("times", index) or (), group.get("points", index) or ()
    if len(times) != len(frames):
        raise RejectedError(f"{len(times)} timestamps and {len(frames)} frames of points")
    scale = _frame_size(group, index) if options.scale == "pixel" else SCALES[options.scale]
    by_time: dict[float, tuple[tuple[float, float], ...]] = {}
    for time, points in zip(times, frames, strict=True):  # a time may occur several times, with one point each
        at = math.floor((float(time) - start) / POINT_GRID) * POINT_GRID
        by_time[at] = by_time.get(at, ()) + to_fractions(xy_pairs(points), scale)
    return tuple(PointGroup(at=at, points=by_time[at]) for at in sorted(by_time) if by_time[at])


def _frame_size(group: Group, index: int = 0) -> tuple[float, float]:
    return float(group.get("width", index)), float(group.get("height", index))


def video_track(group: Group, options: VideoTrackOptions) -> Iterator[Example | Omitted]:
    """Convert one video with tracked objects, in pixels of `width` x `height`.

    The field `frames` has the points frame by frame; the field `objects` has them object by object, with a point or
    null for each frame. The question asks for `sampling_fps` (or `options.sampling_fps`) answers per second; the
    processor thins the answer to these and to the frames it samples. For a video stored as images see `_image_rate`.
    """
    scale = _frame_size(group)
    rate = float(options.sampling_fps or group.get("sampling_fps"))
    if (fps := group.get("fps")) is not None and fps % rate:
        yield group.omit(f"{fps} frames per second are no multiple of {rate:g} answers")
        return
    frames = []
    for time, points in _frames(group):
        visible = [(number, *to_fractions(xy_pairs([point]), scale)[0]) for number, point in points if point]
        occluded = tuple(number for number, point in points if not point)
        frames.append(TrackGroup(time=time, objects=tuple(visible), occluded=occluded))
    tracks = Tracks(
        style=options.style,
        label=text_of(group.get("label")),
        fps=rate,
        groups=tuple(sorted(frames, key=lambda g: g.time)),
        video_fps=float(fps) if fps else None,
    )
    if not any(frame.objects for frame in tracks.groups):
        yield group.omit("no object is visible in any frame")
        return
    video = group.media.video(group.text("video"), row=group.values[0], fps=_image_rate(group))
    yield group.example([tracks], video=video)


def _frames(group: Group) -> Iterator[tuple[float, list[tuple[int, Any]]]]:
    """Yield the time of each frame in seconds, and its objects: number, and point (pixels), None if it is occluded."""
    for frame in group.get("frames") or ():
        points = [(int(point["id"]), None if point["occluded"] else point["point"]) for point in frame["points"] or ()]
        yield float(frame["time"]), points
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
