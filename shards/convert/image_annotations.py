"""Converters of captions and points on images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from shards.catalog.converters import ImageCaptionOptions, ImagePointsOptions, MultiImagePointsOptions
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
from shards.convert.image_questions import images_of
from shards.media.images import image_size
from shards.media.types import MediaError
from shards.schema import Annotation, Example, ImageRef, PointGroup, Points, RejectedError, Text


def image_caption(group: Group, options: ImageCaptionOptions) -> Iterator[Example | Omitted]:
    """Convert an image with a caption and, in `options.transcript_stages`, a transcript of a spoken description.

    The field `question` is a prompt of its own for the caption. Of several transcripts, one is drawn for each text
    variant.
    """
    annotations: list[Annotation] = []
    if caption := group.text("caption"):
        annotations.append(Text(style=options.style, question=group.text("question"), answer=caption))
    if group.stage in options.transcript_stages:
        spoken = [text_of(transcript) for transcript in group.items("transcripts")]
        if spoken := [transcript for transcript in spoken if transcript]:
            drawn = [pick(spoken, rng) for rng in group.generators("transcript")]
            annotations.append(of_variants([Text(style="transcript", answer=transcript) for transcript in drawn]))
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
            label = label.lower() if options.lower_labels else label
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

    All draws are made for each text variant; one with more than `options.max_points` points is replaced by another
    variant's. With probability 1/2 the question is about all images, else about a random subset; {images} in its text
    becomes "image_3, image_1". Labels whose `normalized` names are equal are one; the question has one of them.
    """
    labels, points = group.items("labels"), group.items("points")
    normalized = group.items("normalized") if group.maps("normalized") else labels
    images = images_of(group)
    if not len(images) == len(labels) == len(normalized) == len(points):
        raise RejectedError(f"{len(images)} images, {len(labels)} labels and {len(points)} lists of points")
    names = [(text_of(name), text_of(label)) for name, label in zip(normalized, labels, strict=True)]
    drawn = [_about_images(options, names, points, rng) for rng in group.generators("images")]
    if few := [annotation for annotation in drawn if annotation.count <= options.max_points]:
        yield group.example([of_variants(few)], images=images)
    else:
        yield group.omit(f"more than {options.max_points} points: {drawn[0].count}")


def _about_images(
    options: MultiImagePointsOptions, names: list[tuple[str, str]], points: list[Any], rng: np.random.Generator
) -> Points:
    """A question about one of the labels in all images, or in a random subset in random order.

    `names` has the normalized name and the label of every image.

    Raises:
        RejectedError: no image has a label.
    """
    different = sorted({name for name, label in names if name and label})
    if not different:
        raise RejectedError("no label")
    asked, style = pick(different, rng), pick(options.styles, rng)
    label = pick([label for name, label in names if name == asked and label], rng)
    everywhere, places = len(names) == 1 or rng.random() < 0.5, list(range(len(names)))
    if not everywhere:
        places = [int(i) for i in rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]]
    groups = [
        PointGroup(at=place + 1, points=to_fractions(xy_pairs(points[place]), SCALES[options.scale]))
        for place in places
        if names[place][0] == asked and points[place]
    ]
    question = ""
    if not everywhere:
        named = ", ".join(f"image_{place + 1}" for place in places)
        question = pick(options.ask_some[style], rng).format(label=label, images=named)
    return Points(style=style, label=label, question=question, groups=tuple(groups))


def _pixel_scale(image: ImageRef) -> tuple[float, float]:
    """Width and height of an image as it is shown, by which points in pixels are divided."""
    try:
        width, height = image_size(image)
    except MediaError as error:
        raise RejectedError(f"media: {error}") from None
    return float(width), float(height)
