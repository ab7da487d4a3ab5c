"""Types of metrics, and the metrics that need no library: a prediction against its annotation, from 0 to 1.

A metric also gives the chance level if it follows from the question (options, size of the boxes). The other metrics are
in `choices`, `text_scores`, `point_scores`, `track_scores` and `caption_scores`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2.processing.points import parse_points
from shards.schema import Annotation, Points, Text

_TAG = re.compile(r"<(points|tracks)\b.*?(</\1>|$)", re.DOTALL)
_INTEGER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Score:
    """A score from 0 (wrong) to 1 (right). `chance`: expected score of a guess; None if the benchmark gives it."""

    value: float
    chance: float | None = None


# A metric of one answer: prediction, annotation, and the source's row with the catalog row's `facts` -> score.
Metric = Callable[[str, Annotation, Mapping[str, Any]], Score]


@dataclass(frozen=True, slots=True)
class Answered:
    """A prediction, the annotation and the source's row: the input of a corpus metric for each question."""

    prediction: str
    asked: Annotation
    row: Mapping[str, Any]


# A metric of all answers of a benchmark together, for scores that are not a mean over questions.
CorpusMetric = Callable[[Sequence[Answered]], float]


def plain(text: str) -> str:
    """The text in lower case, without final full stops, its words separated by single spaces."""
    return " ".join(text.lower().strip().rstrip(".").split())


def exact_match(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """1 if the texts are equal, ignoring case, white space and final full stops."""
    assert isinstance(asked, Text)
    return Score(float(plain(prediction) == plain(asked.answer)))


def read_count(text: str) -> int | None:
    """The last integer outside of point tags; 0 for a text with "none"; else None."""
    plain = _TAG.sub(" ", text)
    numbers = _INTEGER.findall(plain)
    if numbers:
        return int(numbers[-1])
    return 0 if "none" in plain.lower() else None


def right_count(asked: Annotation) -> int:
    """The right number: the number of points, or the number in the answer.

    Raises:
        ValueError: the answer states no number.
    """
    if isinstance(asked, Points):
        return asked.count
    assert isinstance(asked, Text)
    count = read_count(asked.answer)
    if count is None:
        raise ValueError(f"the answer {asked.answer!r} to {asked.question!r} states no number")
    return count


def count_exact(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """1 if the prediction states the right number."""
    return Score(float(read_count(prediction) == right_count(asked)))


Box = tuple[float, float, float, float]


def hits(points: Sequence[tuple[float, float]], boxes: Sequence[Box]) -> int:
    """The largest number of boxes (x0, y0, x1, y1) that can be matched with different points inside them."""
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
    """The number of matched boxes over the larger of the numbers of boxes and points.

    Superfluous points therefore cost as much as missing ones. `row["boxes"]`: x0, y0, x1, y1 in percent. Chance is for
    one random point per box.
    """
    boxes = [(box["x0"], box["y0"], box["x1"], box["y1"]) for box in row["boxes"]]
    points = [(100 * point.x, 100 * point.y) for point in parse_points(prediction)]
    area = sum((x1 - x0) * (y1 - y0) / 1e4 for x0, y0, x1, y1 in boxes) / len(boxes)
    return Score(hits(points, boxes) / max(len(points), len(boxes)), area)
