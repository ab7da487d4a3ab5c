"""What a prediction is worth: text against the annotation that was asked, one number from 0 to 1.

Every metric also gives the chance level where it follows from the question (options, size of the boxes). Here are the
kinds of metrics and those without a library; `metrics_text`, `metrics_points`, `metrics_tracks` and
`metrics_captions` hold the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2.processing.points import parse_points
from shards.schema import Annotation, Choice, Points, Text

_TAG = re.compile(r"<(points|tracks)\b.*?(</\1>|$)", re.DOTALL)
_INTEGER = re.compile(r"\d+")
_LABEL = re.compile(r"\s*[\[(]?([A-Za-z])\b")


@dataclass(frozen=True, slots=True)
class Score:
    """0 (wrong) to 1 (right), and what a blind guess is worth on average; None where the benchmark must say."""

    value: float
    chance: float | None = None


# prediction, what was asked, the row of the source with the columns that the benchmark asks for
Metric = Callable[[str, Annotation, Mapping[str, Any]], Score]


@dataclass(frozen=True, slots=True)
class Answered:
    """A prediction, what was asked, and the row: what a corpus metric takes of every question."""

    prediction: str
    asked: Annotation
    row: Mapping[str, Any]


# all answers of a benchmark to one number, for scores that are no mean over questions
CorpusMetric = Callable[[Sequence[Answered]], float]


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())


def exact_match(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Equal but for case, spaces and a final full stop."""
    assert isinstance(asked, Text)
    return Score(float(_plain(prediction) == _plain(asked.answer)))


def read_count(text: str) -> int | None:
    """The last integer outside of point tags; "there are none" is 0; None without either."""
    plain = _TAG.sub(" ", text)
    numbers = _INTEGER.findall(plain)
    if numbers:
        return int(numbers[-1])
    return 0 if "none" in plain.lower() else None


def asked_count(asked: Annotation) -> int:
    """The right number: of points, or the answer's own.

    Raises:
        ValueError: an answer that states no number.
    """
    if isinstance(asked, Points):
        return asked.count
    assert isinstance(asked, Text)
    count = read_count(asked.answer)
    if count is None:
        raise ValueError(f"the answer {asked.answer!r} to {asked.question!r} states no number to count to")
    return count


def count_exact(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """The number that the answer states is the right one."""
    return Score(float(read_count(prediction) == asked_count(asked)))


def choice_of(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer names: by "A." before it, else by its text alone."""
    label = _LABEL.match(text)
    if label and ord(label[1].upper()) - ord("A") < len(options) and not _is_option(text, options):
        return ord(label[1].upper()) - ord("A")
    for index, option in enumerate(options):
        if _plain(option) == _plain(text):
            return index
    return None


def _is_option(text: str, options: Sequence[str]) -> bool:
    return _plain(text) in {_plain(option) for option in options}


def multiple_choice(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """The right option was named."""
    assert isinstance(asked, Choice)
    return Score(float(choice_of(prediction, asked.options) == asked.answer), 1 / len(asked.options))


Box = tuple[float, float, float, float]


def hits(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> int:
    """Largest number of boxes (x0, y0, x1, y1) that can each be given a point of its own that lies inside."""
    owner: dict[int, int] = {}  # point -> box

    def place(box: int, tried: set[int]) -> bool:
        x0, y0, x1, y1 = boxes[box]
        for number, (x, y) in enumerate(points):
            if number not in tried and x0 <= x <= x1 and y0 <= y <= y1:
                tried.add(number)
                if number not in owner or place(owner[number], tried):
                    owner[number] = box
                    return True
        return False

    return sum(place(box, set()) for box in range(len(boxes)))


def points_in_boxes(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Boxes hit by a point of their own, over the larger of both numbers: points too many cost as much as missing ones.

    `row["boxes"]`: x0, y0, x1, y1 in percent. Chance: one random point for each box.
    """
    boxes = [(box["x0"], box["y0"], box["x1"], box["y1"]) for box in row["boxes"]]
    points = [(100 * point.x, 100 * point.y) for point in parse_points(prediction)]
    share = sum((x1 - x0) * (y1 - y0) / 1e4 for x0, y0, x1, y1 in boxes) / len(boxes)
    return Score(hits(points, boxes) / max(len(points), len(boxes)), share)
