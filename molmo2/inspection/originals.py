"""Examples of a raw dataset before processing: questions and answers with their images or video.

Text is rendered in the form of the stage without random draws, so that two runs show the same. No tokenizer and no
shards are needed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image

from molmo2.processing.contract import STAGE_MODES
from molmo2.processing.frames import frame_times
from molmo2.processing.pictures import COLOURS, LARGE, SMALL, Mark, Picture, spread, to_picture
from molmo2.processing.prompts import Message, render_messages
from shards.catalog import Row, Stage
from shards.convert.common import Group
from shards.convert.reading import convert_or_reject, open_rows, read_groups, stage_groups
from shards.media.images import load_image
from shards.media.types import MediaError, Pixels
from shards.media.video import probe_video, read_frames
from shards.schema import Annotation, Example, Points, RejectedError, Tracks, VideoRef

MOST_FRAMES = 12  # maximum number of evenly spaced frames of a video; as many marked frames are added
FPS = 2.0  # frames per second from which the frames of a video are chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationView:
    """The view of one annotation. `num_points` is None for annotations without points."""

    kind: str
    style: str
    messages: tuple[Message, ...]
    num_points: int | None
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleView:
    """The view of one example. `left_out`: why a row gave no example; `media`: sizes and durations as text."""

    key: str
    source: str
    left_out: str = ""
    media: tuple[str, ...] = ()
    annotations: tuple[AnnotationView, ...] = ()
    pictures: tuple[Picture, ...] = ()


def view_examples(row: Row, stage: Stage, raw: Path, num_samples: int, *, pictures: bool) -> Iterator[ExampleView]:
    """Yield views of the examples in `num_samples` evenly spaced groups of rows.

    Args:
        row: the dataset.
        stage: the stage, which determines the split and the form of the text.
        raw: the dataset's raw folder.
        num_samples: number of groups of rows; a group has one image or video.
        pictures: whether to decode images and videos.

    Raises:
        MissingSourceError: the raw data are missing.
        SourceError: a file is unreadable or has another layout.
    """
    table = open_rows(row, stage, raw)
    groups = stage_groups(row, stage, table)
    for group in read_groups(row, stage, raw, table, [groups[i] for i in spread(len(groups), num_samples)]):
        yield from _views(group, pictures)


def _views(group: Group, pictures: bool) -> Iterator[ExampleView]:
    for item in convert_or_reject(group):  # as the builder does
        place = f"{item.source.file} row {item.source.row}"
        if isinstance(item, Example):
            yield _view(item, group.stage, place, pictures)
        else:
            yield ExampleView(key=group.key, source=place, left_out=item.reason)


def _view(example: Example, stage: Stage, place: str, pictures: bool) -> ExampleView:
    video = example.video is not None
    annotations = []
    for i, annotation in enumerate(example.annotations):
        try:
            messages = render_messages(annotation, STAGE_MODES[stage], None, video=video)
        except RejectedError as error:
            messages = (Message("rejected", str(error)),)
        annotations.append(
            AnnotationView(
                kind=type(annotation).__name__,
                style=annotation.style,
                messages=messages,
                num_points=_num_points(annotation),
                colour=COLOURS[i % len(COLOURS)],
            )
        )
    try:
        facts, drawn = _media(example, pictures)
    except MediaError as error:
        facts, drawn = [f"not readable: {error}"], []
    view = ExampleView(key=example.key, source=place, media=tuple(facts), annotations=tuple(annotations))
    return replace(view, pictures=tuple(drawn))


def _num_points(annotation: Annotation) -> int | None:
    if isinstance(annotation, Tracks):
        return sum(len(group.objects) for group in annotation.groups)
    return annotation.count if isinstance(annotation, Points) else None


def _media(example: Example, pictures: bool) -> tuple[list[str], list[Picture]]:
    """Facts about an example's media as text, and the pictures themselves if `pictures`."""
    if example.video is not None:
        info = probe_video(example.video)
        size = f"{info.width} x {info.height}"
        fact = f"video {size}, {info.duration:.1f} s at {info.fps:.3g} frames/s, {info.codec}: {example.video.path}"
        return [fact], _frames(example, example.video, info.duration) if pictures else []
    facts, drawn = [], []
    marks = _marks(example)
    for number, ref in enumerate(example.images, start=1):
        pixels = load_image(ref)
        height, width = pixels.shape[:2]
        facts.append(f"image {number}: {width} x {height}{f', {ref.path}' if ref.path else ''}")
        if pictures:
            here = [mark for at, mark in marks if round(at) == number]
            drawn.append(to_picture(_jpeg(pixels, LARGE), f"image {number}, {width} x {height}", LARGE, marks=here))
    return facts, drawn


def _frames(example: Example, ref: VideoRef, duration: float) -> list[Picture]:
    """Evenly spaced frames of a video, and frames with points."""
    marks = _marks(example)
    marked = sorted({min(max(at, 0.0), duration) for at, _ in marks})
    chosen = {marked[i] for i in spread(len(marked), MOST_FRAMES)}
    times = sorted({round(time, 2) for time in (*frame_times(duration, FPS, MOST_FRAMES), *chosen)})
    pixels = read_frames(ref, times).pixels
    nearest = [int(np.abs(np.array(times) - at).argmin()) for at, _ in marks]
    drawn = []
    for i, time in enumerate(times):
        here = [mark for number, (_, mark) in zip(nearest, marks, strict=True) if number == i]
        drawn.append(to_picture(_jpeg(pixels[i], SMALL * 2), f"{time:.2f} s", SMALL, marks=here))
    return drawn


def _marks(example: Example) -> list[tuple[float, Mark]]:
    """All points and tracks, each as (image number or seconds, mark in fractions).

    They are numbered as in the answer: points in the order of the text, objects of tracks by first appearance.
    """
    marks = []
    for i, annotation in enumerate(example.annotations):
        if isinstance(annotation, Points):
            groups = sorted(annotation.groups, key=lambda group: group.at)
            places = [(group.at, x, y) for group in groups for x, y in sorted(group.points)]
            colour = COLOURS[i % len(COLOURS)]
            marks += [
                (at, Mark(x=x, y=y, label=str(number), colour=colour)) for number, (at, x, y) in enumerate(places, 1)
            ]
        elif isinstance(annotation, Tracks):
            numbers: dict[int, int] = {}
            for group in sorted(annotation.groups, key=lambda group: group.time):
                for x, y, obj in sorted((x, y, obj) for obj, x, y in group.objects):
                    number = numbers.setdefault(obj, len(numbers) + 1)
                    colour = COLOURS[(number - 1) % len(COLOURS)]
                    marks.append((group.time, Mark(x=x, y=y, label=str(number), colour=colour)))
    return marks


def _jpeg(pixels: Pixels, most: int) -> bytes:
    """A JPEG whose longer side has at most `most` pixels."""
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def lines(views: Sequence[ExampleView]) -> Iterator[str]:
    """Examples as text for a terminal; control characters in the data are escaped."""
    for view in views:
        yield f"--- {view.key}  ({view.source})"
        if view.left_out:
            yield _plain(f"left out: {view.left_out}")
        yield from map(_plain, view.media)
        for annotation in view.annotations:
            points = (
                ""
                if annotation.num_points is None
                else f", {annotation.num_points} point{'s' * (annotation.num_points != 1)}"
            )
            yield _plain(f"  {annotation.kind} {annotation.style}{points}")
            for message in annotation.messages:
                text = _plain(message.content).replace("\n", "\n    ")
                yield f"    {message.role}: {text}"
        yield ""


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
