"""Converter of AI2D: questions on diagrams; for some of them letters are drawn over the texts of the diagram."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from shards.catalog.converters import DiagramChoiceOptions
from shards.convert.common import Group, Omitted, text_of
from shards.media.images import load_image
from shards.media.types import MediaError
from shards.schema import Choice, Example, ImageRef, RejectedError

NO_OPTION = "{}"  # the dataset's placeholder for a missing option
_Boxes = tuple[tuple[str, tuple[int, ...]], ...]  # the letter of each text, and its box: left, top, right, bottom


def diagram_choice(group: Group, options: DiagramChoiceOptions) -> Iterator[Example | Omitted]:
    """Convert one question; a question about letters gives one example for each of the two ways to draw them.

    The boxes of the texts are read from `options.annotations`, a path template of a JSON file with the image's name as
    `{value}`. A letter is drawn inside an opaque cyan box, and to the left of a transparent one. A question is about
    the letters if they are its options, with at most one other; these are in upper case, as they are drawn.
    """
    texts = [text_of(option) for option in group.items("options")]
    answer = group.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise RejectedError(f"answer {answer!r} of {len(texts)} options")
    right = texts[answer]
    present = list(dict.fromkeys(option for option in texts if option != NO_OPTION))
    if right not in present:
        raise RejectedError("the right option is the one that is not there")
    image, boxes = group.image(), _Boxes()
    if drawn := bool(group.get("letters")):
        boxes = _boxes(group.media.root / options.annotations.format(value=group.get("image")))
    letters = {letter for letter, _ in boxes}
    about_letters = drawn and sum(option.upper() in letters for option in present) >= len(present) - 1
    if about_letters:
        written = {option: option.upper() if option.upper() in letters else option for option in present}
        present, right = list(dict.fromkeys(written.values())), written[right]
    choice = Choice(
        style="ai2_diagram_no_letter" if about_letters else "ai2_diagram",
        question=group.text("question"),
        options=tuple(present),
        answer=present.index(right),
        labelled=not about_letters,
    )
    if not drawn:
        yield group.example([choice], images=[image])
        return
    for name, opaque in (("opaque", True), ("transparent", False)):
        yield group.example([choice], images=[_draw_letters(image, boxes, opaque)], suffix=f"-{name}")


@functools.lru_cache(maxsize=16)
def _boxes(path: Path) -> _Boxes:
    """Upper-case letter and box (left, top, right, bottom; pixels) of every text that has a letter."""
    try:
        texts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["text"]
        named = [(text_of(text.get("replacementText")), text["rectangle"]) for text in texts.values()]
        return tuple(
            (letter.upper(), tuple(int(v) for corner in box for v in corner)) for letter, box in named if letter
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RejectedError(f"media: {path}: no boxes for the letters ({type(error).__name__}: {error})") from None


def _draw_letters(image: ImageRef, boxes: _Boxes, opaque: bool) -> ImageRef:
    try:
        picture = PIL.Image.fromarray(load_image(image))
    except MediaError as error:
        raise RejectedError(f"media: {error}") from None
    draw = PIL.ImageDraw.Draw(picture)
    for letter, (left, top, right, bottom) in boxes:
        height = max(8, bottom - top)
        font = PIL.ImageFont.load_default(size=height)
        if opaque:
            draw.rectangle((left, top, right, bottom), fill="cyan", outline="black")
            draw.text(((left + right) / 2, (top + bottom) / 2), letter, fill="black", font=font, anchor="mm")
        else:
            draw.rectangle((left, top, right, bottom), outline="black")
            draw.text((max(left - 2, height), (top + bottom) / 2), letter, fill="black", font=font, anchor="rm")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())
