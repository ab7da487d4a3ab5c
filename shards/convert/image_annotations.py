"""Converters of captions and points on images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shards.catalog.converters import ImageCaptionOptions, ImagePointsOptions, MultiImagePointsOptions
from shards.convert.common import (
    SCALES,
    Group,
    Omitted,
    packed_points,
    require_annotations,
    rng_of,
    text_of,
    to_fractions,
    xy_pairs,
)
from shards.convert.image_questions import images_of
from shards.media.images import image_size
from shards.media.types import MediaError
from shards.schema import Annotation, Example, ImageRef, PointGroup, Points, RejectedError, Text


def image_caption(group: Group, options: ImageCaptionOptions) -> Iterator[Example | Omitted]:
    """Convert an image with a long caption and, in `options.transcript_stages`, transcripts of spoken descriptions."""
    annotations: list[Annotation] = []
    if caption := group.text("caption"):
        annotations.append(Text(style="long_caption", answer=caption))
    if group.stage in options.transcript_stages:
        spoken = [text_of(transcript) for transcript in group.items("transcripts")]
        annotations += [Text(style="transcript", answer=transcript) for transcript in spoken if transcript]
    require_annotations(annotations, "no caption and no transcript")
    yield group.example(annotations, images=[group.image()])


def image_points(group: Group, options: ImagePointsOptions) -> Iterator[Example | Omitted]:
    """Convert an image with labels and their points; gives an example for each of `options.styles`.

    A row has one label, or a list of labels with a list of points for each. The field `number` is the count if there
    are no points.
    """
    most, image = options.max_points, group.image()
    counted = bool({"points", "number"} & set(group.row.columns))  # else an image is only asked about, as in evaluation
    scale = _pixel_scale(image) if options.scale == "pixel" else SCALES[options.scale]
    labels = []
    for index in range(len(group.values)):
        for label, question, value in _labelled(group, index):
            points = to_fractions(xy_pairs(value), scale)
            if label and len(points) <= most:
                groups = (PointGroup(at=1, points=points),) if points else ()
                number = None if points else _number(group.get("number", index), value, counted)
                labels.append(Points(style="", label=label, question=question, groups=groups, number=number))
            else:
                yield group.omit(f"more than {most} points: {len(points)}" if label else "no label", index)
    for style in options.styles if group.stage != "eval" else options.styles[:1]:
        for number, run in enumerate(packed_points(labels, most)):
            yield group.example(
                [replace(points, style=style) for points in run], images=[image], suffix=f"-{style}-{number}"
            )


def _number(number: Any, points: Any, counted: bool) -> int | None:
    """The count of a label without points; None if an empty list of points is the count.

    Raises:
        RejectedError: the row's columns hold points or counts (`counted`), and there are neither points nor a number.
    """
    if counted and number is None and points is None:
        raise RejectedError("points: null, and no number; an empty list means that there are none")
    if number is None:
        return None
    if not isinstance(number, int | float) or number != int(number):
        raise RejectedError(f"number: {number!r} is no whole number")
    return int(number)


def _labelled(group: Group, index: int) -> Iterator[tuple[str, str, Any]]:
    """Yield label, question and points of a row, or of each item if the row has lists."""
    label, question, points = (group.get(field, index) for field in ("label", "question", "points"))
    if not isinstance(label, list):
        yield text_of(label), text_of(question), points
        return
    if len(points or ()) != len(label):
        raise RejectedError(f"{len(label)} labels and {len(points or ())} lists of points")
    for place, name in enumerate(label):
        yield text_of(name), text_of(question[place]) if question else "", points[place]


def multi_image_points(group: Group, options: MultiImagePointsOptions) -> Iterator[Example | Omitted]:
    """Convert several images, each with a label and points: one label is drawn, and asked about in all or some images.

    With probability 1/2 the question is about all images, else about a random subset; {images} in its text becomes
    "image_1, image_3".
    """
    labels, points = group.items("labels"), group.items("points")
    images = images_of(group)
    if not len(images) == len(labels) == len(points):
        raise RejectedError(f"{len(images)} images, {len(labels)} labels and {len(points)} lists of points")
    draw = rng_of(f"{group.row.name}/{group.key}", "multi-image points")
    names = sorted({text for label in labels if (text := text_of(label))})
    if not names:
        raise RejectedError("no label")
    label = names[int(draw.integers(len(names)))]
    style = options.styles[int(draw.integers(len(options.styles)))]
    everywhere, places = draw.random() < 0.5, list(range(len(images)))
    if not everywhere:
        places = sorted(int(i) for i in draw.permutation(len(images))[: draw.integers(1, len(images) + 1)])
    groups = [
        PointGroup(at=place + 1, points=to_fractions(xy_pairs(points[place]), SCALES[options.scale]))
        for place in places
        if text_of(labels[place]) == label and points[place]
    ]
    question = ""
    if not everywhere:
        texts = options.ask_some[style]
        named = ", ".join(f"image_{place + 1}" for place in places)
        question = texts[int(draw.integers(len(texts)))].format(label=label, images=named)
    annotation = Points(style=style, label=label, question=question, groups=tuple(groups))
    if annotation.count > options.max_points:
        yield group.omit(f"more than {options.max_points} points: {annotation.count}")
    else:
        yield group.example([annotation], images=images)


def _pixel_scale(image: ImageRef) -> tuple[float, float]:
    """Width and height of an image as it is shown, by which points in pixels are divided."""
    try:
        width, height = image_size(image)
    except MediaError as error:
        raise RejectedError(f"media: {error}") from None
    return float(width), float(height)
