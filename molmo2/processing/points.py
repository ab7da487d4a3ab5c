"""Formatting and parsing of points and tracks as text.

    <points coords="1 1 500 250 2 730 400">dog</points>            one image: frame "1", then id x y ...
    <points coords="0.5 1 500 250;2.0 2 510 260">dog</points>      video: seconds; a frame separator between frames
    <tracks coords="0.0 1 500 250 2 730 400;0.5 1 505 250">dogs</tracks>

x and y are thousandths of width and height. Parsing accepts imperfect output of a model: other separators, and text
that ends before the closing quote or tag.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shards.schema import PointGroup, RejectedError, TrackGroup

SEPARATORS = {"html-v1": "\t", "html-v2": ";"}  # Molmo2's name of the format -> separator between frames
NO_TRACKS = "No tracks available."
SCALE = 1000  # coordinates are integers from 0 to this

# A model may write anything: each pattern reads a text in one pass, and no number is longer than a point can have.
_TAG = re.compile(r"<(points|tracks)\b[^<>]*?coords=\"(?P<coords>[0-9\t:;,. ]*)")
_GROUP_BREAK = re.compile(r"[\t:,;]")
_AT = re.compile(r"\d{1,9}(\.\d{1,9})?")
_TRIPLE = re.compile(r"(?<!\d)(\d{1,9}) +(\d{3,4}) +(\d{3,4})(?!\d)")


@dataclass(frozen=True, slots=True)
class ParsedPoint:
    """A point read from text: `at` as printed (image number or seconds), object id, x and y as fractions."""

    at: float
    id: int
    x: float
    y: float


def _scaled(fraction: float) -> int:
    if not math.isfinite(fraction):
        raise RejectedError(f"a coordinate is {fraction}")
    return min(max(round(SCALE * fraction), 0), SCALE)


def _tag(name: str, groups: Sequence[tuple[str, list[tuple[int, int, int]]]], label: str, separator: str) -> str:
    """The tag's text; `groups` are (frame as printed, [(id, x, y), ...])."""
    frames = [" ".join([at, *(f"{i} {x:03d} {y:03d}" for i, x, y in points)]) for at, points in groups]
    return f'<{name} coords="{separator.join(frames)}">{label}</{name}>'


def format_points(groups: Sequence[PointGroup], label: str, *, seconds: bool, separator: str) -> str:
    """The text of all points; their ids count from 1 in output order, so that the last id is the number of points.

    Args:
        groups: points of each image or frame in fractions; this function sorts them.
        label: the name of the objects.
        seconds: print `at` with one decimal (video) instead of as an image number.
        separator: text between frames, one of `SEPARATORS`.
    """
    number, out = 1, []
    for group in sorted(groups, key=lambda group: group.at):
        points = sorted((_scaled(x), _scaled(y)) for x, y in group.points)
        if points:
            out.append((_at(group.at, seconds), [(number + i, x, y) for i, (x, y) in enumerate(points)]))
        number += len(points)
    return _tag("points", out, label, separator)


def format_tracks(groups: Sequence[TrackGroup], label: str, *, separator: str) -> str:
    """The text of all tracks; objects are numbered from 1 by first appearance, and by (x, y) within a frame."""
    numbers: dict[int, int] = {}
    out = []
    for group in sorted(groups, key=lambda group: group.time):
        seen = sorted((_scaled(x), _scaled(y), obj) for obj, x, y in group.objects)
        for _, _, obj in seen:
            numbers.setdefault(obj, len(numbers) + 1)
        if seen:
            out.append((_at(group.time, True), sorted((numbers[obj], x, y) for x, y, obj in seen)))
    return _tag("tracks", out, label, separator) if out else NO_TRACKS


def _at(at: float, seconds: bool) -> str:
    return f"{at:.1f}" if seconds else str(int(at))


def parse_points(text: str) -> list[ParsedPoint]:
    """All points and tracks in `text`, in order; an empty list if there are none.

    Points outside the image are dropped, and so is a second point of the same id in one frame of a track. The last
    point of a truncated text counts only if both its coordinates are complete, with three digits.
    """
    return [point for tag in _TAG.finditer(text) for point in _parse_tag(tag)]


def _parse_tag(tag: re.Match[str]) -> list[ParsedPoint]:
    points: list[ParsedPoint] = []
    for group in _GROUP_BREAK.split(tag["coords"]):
        at, _, rest = group.strip().partition(" ")
        if not _AT.fullmatch(at):
            continue
        ids: set[int] = set()
        for match in _TRIPLE.finditer(rest):
            number, x, y = (int(digits) for digits in match.groups())
            if max(x, y) > SCALE or (tag[1] == "tracks" and number in ids):
                continue
            ids.add(number)
            points.append(ParsedPoint(float(at), number, x / SCALE, y / SCALE))
    return points
