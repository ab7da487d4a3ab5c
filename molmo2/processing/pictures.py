"""A sample's pictures with the points and tracks of a text on them.

Pages draw them as SVG over the picture; `raster` draws them into pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from molmo2.processing.points import ParsedPoint, parse_points
from shards.layout import VisualLayout
from shards.stream.reader import StoredSample

LARGE = 420  # longer side of an image on a page, screen pixels
SMALL = 168  # longer side of a view or a frame on a page, screen pixels
MOST_FRAMES = 24  # maximum number of frames shown of one video
MOST_RASTER = 6  # maximum number of pictures that `raster` puts side by side
MOST_ZOOM = 4.0  # maximum enlargement, reached by the demo's pictures of 48 pixels
COLOURS = ("#e6194b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6", "#3cb44b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point on a picture, in pixels of the picture. `trail`: earlier points of a track, oldest first."""

    x: float
    y: float
    label: str
    colour: str
    trail: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One JPEG with crops and marks to draw on it. `crops`: (x, y, side) of each crop, in pixels of the picture.

    `zoom`: screen pixels per pixel of the picture.
    """

    caption: str
    uri: str
    width: int
    height: int
    zoom: float
    crops: tuple[tuple[int, int, int], ...] = ()
    marks: tuple[Mark, ...] = ()


def spread(size: int, num_samples: int) -> list[int]:
    """At most `num_samples` evenly spaced integers below `size`."""
    count = min(size, num_samples)
    return [i * size // count for i in range(count)]


def to_picture(
    jpeg: bytes,
    caption: str,
    screen: int,
    crops: tuple[tuple[int, int, int], ...] = (),
    marks: Sequence[Mark] = (),
) -> Picture:
    """A picture of a JPEG, with marks given in fractions. `screen`: its longer side on a page, screen pixels."""
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
    """Draw pictures side by side with their points and trails; of many, those with points are taken first.

    The result is None if there are no pictures.
    """
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


# --- pictures of a stored sample --------------------------------------------------------------------------------------


def pictures_of(stored: StoredSample, layout: VisualLayout, texts: dict[int, str]) -> tuple[Picture, ...]:
    """A sample's pictures with the points and tracks of `texts`, whose keys are annotation numbers from 1."""
    return tuple(_pictures(stored, layout, _marks(stored.visuals, texts)))


def _marks(visuals: Sequence[dict[str, Any]], texts: dict[int, str]) -> dict[int, list[Mark]]:
    """Points and tracks of all branches, by number of the visual, in fractions of its width and height."""
    marks: dict[int, list[Mark]] = {}
    for number, text in texts.items():
        tracks, trails = "<tracks" in text, dict[int, tuple[tuple[float, float], ...]]()
        for point in parse_points(text):
            visual = _visual_at(visuals, point)
            if visual is None:
                continue
            trail = trails.get(point.id, ()) if tracks else ()
            trails[point.id] = (*trail, (point.x, point.y))
            colour = COLOURS[(point.id - 1 if tracks else number - 1) % len(COLOURS)]
            mark = Mark(x=point.x, y=point.y, label=str(point.id), colour=colour, trail=trail)
            marks.setdefault(visual, []).append(mark)
    return marks


def _visual_at(visuals: Sequence[dict[str, Any]], point: ParsedPoint) -> int | None:
    """The number of the frame nearest to a point's time, or of the image that the point names; None if it is absent."""
    times = [visual["time"] for visual in visuals if visual["kind"] == "frame"]
    if times:
        return int(np.abs(np.array(times) - point.at).argmin())
    return int(point.at) - 1 if 1 <= point.at <= len(visuals) else None


def _pictures(stored: StoredSample, layout: VisualLayout, marks: dict[int, list[Mark]]) -> Iterator[Picture]:
    """The stored JPEGs of the visuals; of a long video only the frames with points, and some others."""
    shown = _shown(len(stored.visuals), sorted(marks)) if len(stored.visuals) > MOST_FRAMES else None
    for i, visual in enumerate(stored.visuals):
        own = marks.get(i, [])
        if visual["kind"] == "frame":
            if shown is None or i in shown:
                yield to_picture(bytes(stored.images[visual["view"]]), f"{visual['time']:.1f} s", SMALL, marks=own)
            continue
        rows, cols = visual["tiling"]
        stride, side = layout.window_patches * layout.patch_size, layout.crop_size
        crops = tuple((col * stride, row * stride, side) for row in range(rows) for col in range(cols))
        if visual["canvas"] != visual["view"]:
            yield to_picture(bytes(stored.images[visual["view"]]), f"image {i + 1}, the whole", SMALL)
        caption = f"image {i + 1}, {rows} x {cols} crops"
        yield to_picture(bytes(stored.images[visual["canvas"]]), caption, LARGE, crops=crops, marks=own)


def _shown(count: int, marked: Sequence[int]) -> set[int]:
    """Numbers of the frames to show: up to `MOST_FRAMES` marked ones, the rest spread over the video."""
    frames = [marked[i] for i in spread(len(marked), MOST_FRAMES)]
    others = [i for i in range(count) if i not in set(frames)]
    return {*frames, *(others[i] for i in spread(len(others), MOST_FRAMES - len(frames)))}
