"""JPEGs with what is to be drawn on them. Pages draw it as SVG over the picture; `raster` draws it into pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import simplejpeg
from PIL import Image, ImageDraw

LARGE = 420  # screen pixels of an image's longer side
SMALL = 168  # of a view or a frame
MOST_RASTER = 6  # pictures side by side
MOST_ZOOM = 4.0  # the demo has pictures of 48 pixels
COLOURS = ("#e6194b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6", "#3cb44b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point on a picture, pixels of the picture. `trail`: where a track's object was before, oldest first."""

    x: float
    y: float
    label: str
    colour: str
    trail: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One JPEG and what is drawn on it. `crops`: (x, y, side) of each crop, pixels; `zoom`: screen over picture."""

    caption: str
    uri: str
    width: int
    height: int
    zoom: float
    crops: tuple[tuple[int, int, int], ...] = ()
    marks: tuple[Mark, ...] = ()


def spread(size: int, num_samples: int) -> list[int]:
    """At most `num_samples` numbers below `size`, at equal distances from each other."""
    count = min(size, num_samples)
    return [i * size // count for i in range(count)]


def picture(
    jpeg: bytes,
    caption: str,
    screen: int,
    crops: tuple[tuple[int, int, int], ...] = (),
    marks: Sequence[Mark] = (),
) -> Picture:
    """A JPEG with marks given in fractions; `screen`: pixels that its longer side takes on a page."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    scaled = tuple(
        Mark(
            x=mark.x * width,
            y=mark.y * height,
            label=mark.label,
            colour=mark.colour,
            trail=tuple((x * width, y * height) for x, y in mark.trail),
        )
        for mark in marks
    )
    return Picture(
        caption=caption,
        uri="data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        width=width,
        height=height,
        zoom=min(screen / max(width, height), MOST_ZOOM),
        crops=crops,
        marks=scaled,
    )


def raster(pictures: Sequence[Picture]) -> Image.Image | None:
    """Pictures side by side with their points and trails drawn; of many, those with points first. None for none."""
    order = sorted(range(len(pictures)), key=lambda i: not pictures[i].marks)[:MOST_RASTER]
    parts = [_drawn(pictures[i]) for i in sorted(order)]
    if not parts:
        return None
    whole = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    return whole


def _drawn(picture: Picture) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))).convert("RGB")
    image = image.resize((round(picture.width * picture.zoom), round(picture.height * picture.zoom)))
    draw = ImageDraw.Draw(image)
    for mark in picture.marks:
        trail = [(x * picture.zoom, y * picture.zoom) for x, y in (*mark.trail, (mark.x, mark.y))]
        if len(trail) > 1:
            draw.line(trail, fill=mark.colour, width=2)
        draw.circle(trail[-1], 5, fill=mark.colour, outline="white")
        draw.text((trail[-1][0] + 7, trail[-1][1] - 7), mark.label, fill=mark.colour)
    return image
