"""Captions, questions and points on images."""

from __future__ import annotations

import io
from collections.abc import Iterator

import PIL.Image

from shards.convert.common import Group, Omitted, at_least_one, packed_points, text_of, to_fractions, xy_pairs
from shards.schema import Annotation, Example, ImageRef, PointGroup, Points, RejectedError, Text


def image_caption(group: Group) -> Iterator[Example | Omitted]:
    """One image with a long caption and, in `options.transcript_stages`, what speakers said about it."""
    annotations: list[Annotation] = []
    if caption := text_of(group.get("caption")):
        annotations.append(Text(style="long_caption", answer=caption))
    if group.stage in group.option("transcript_stages"):
        spoken = [text_of(transcript) for transcript in group.get("transcripts") or ()]
        annotations += [Text(style="transcript", answer=transcript) for transcript in spoken if transcript]
    at_least_one(annotations, "no caption and no transcript")
    yield group.example(annotations, images=[group.media.image(group.get("image"))])


def image_qa(group: Group) -> Iterator[Example | Omitted]:
    """One image (embedded, URL or path), or a list of them, with pairs of question and answer."""
    value = group.get("image")
    images = [group.media.image(v) for v in (value if isinstance(value, list) else [value])]
    pairs = group.get("qa_pairs") or {}
    questions, answers = pairs.get("question") or (), pairs.get("answer") or ()
    if len(questions) != len(answers):
        raise RejectedError(f"{len(questions)} questions and {len(answers)} answers")
    style, annotations = str(group.option("style")), []
    for question, answer in zip(map(text_of, questions), map(text_of, answers), strict=True):
        if question and answer:
            annotations.append(Text(style=style, question=question, answer=answer))
        else:
            yield group.omit("an empty question or answer")
    yield group.example(at_least_one(annotations, "no question with an answer"), images=images)


def image_points(group: Group) -> Iterator[Example | Omitted]:
    """One image with labels and their points, an example for each of `options.styles`.

    `options.scale` says what coordinates are: "percent", "pixel", "unit" (0 - 1) or "thousand" (0 - 1000). Labels of
    more than `options.max_points` points are left out, and an example holds at most as many in all.
    """
    most = int(group.option("max_points"))
    image = group.media.image(group.get("image"), group.get("sha256"))
    scales = {"percent": (100.0, 100.0), "unit": (1.0, 1.0), "thousand": (1000.0, 1000.0)}
    kind = group.option("scale")
    scale = _size(image) if kind == "pixel" else scales[kind]
    labels = []
    for index in range(len(group.values)):
        points = to_fractions(xy_pairs(group.get("points", index)), scale)
        label = text_of(group.get("label", index))
        if label and len(points) <= most:
            found = (PointGroup(at=1, points=points),) if points else ()
            labels.append(Points(style="", label=label, groups=found))
        else:
            yield group.omit(f"more than {most} points: {len(points)}" if label else "no label", index)
    for style in group.option("styles") if group.stage != "eval" else group.option("styles")[:1]:
        for number, run in enumerate(packed_points(labels, most)):
            named = [Points(style=style, label=p.label, groups=p.groups) for p in run]
            yield group.example(named, images=[image], suffix=f"-{style}-{number}")


def _size(image: ImageRef) -> tuple[float, float]:
    """Width and height in pixels, from the header."""
    try:
        with PIL.Image.open(image.path if image.path is not None else io.BytesIO(image.data or b"")) as opened:
            return float(opened.width), float(opened.height)
    except (OSError, SyntaxError) as error:
        raise RejectedError(f"media: {image.path or 'embedded image'}: not a readable image ({error})") from None
