"""Metrics of tracks: point F1, and HOTA of points in masks by `trackeval`.

`row["masks"]` has for each object a list with a mask (or None) per frame, in the forms of `point_scores`; `row["fps"]`
is the rate of those frames. An answer is compared at the frame rate of the question. There is no J&F, since it compares
masks, and the model answers with points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from molmo2.eval.metrics.point_scores import Mask, f1, inside, mask_of, most_pairs
from molmo2.eval.metrics.scores import Answered, Score
from molmo2.processing.points import ParsedPoint, parse_points
from shards.schema import Annotation, Tracks

HALF_TENTH: Final = 0.0501  # seconds; tolerance of a point's time, since answers have times with one decimal


class _Scene:
    """The frames of one answer: the predicted points of each frame, and its masks by object."""

    def __init__(self, prediction: str, asked: Annotation, row: Mapping[str, Any]):
        assert isinstance(asked, Tracks)
        self.times = _times(row, asked.fps)
        frames = [round(time * row["fps"]) for time in self.times]
        self.masks: list[dict[int, Mask]] = [
            {
                number: mask_of(stored[frame])
                for number, stored in enumerate(row["masks"])
                if frame < len(stored) and stored[frame] is not None
            }
            for frame in frames
        ]
        self.masks = [{number: mask for number, mask in masks.items() if mask.any()} for masks in self.masks]
        self.points: list[list[ParsedPoint]] = [[] for _ in self.times]
        self.num_elsewhere = 0
        for point in parse_points(prediction):
            near = [i for i, time in enumerate(self.times) if abs(time - point.at) <= HALF_TENTH]
            if near:
                self.points[near[0]].append(point)
            else:
                self.num_elsewhere += 1

    def similarity(self, frame: int) -> npt.NDArray[np.float64]:
        """A matrix [objects, points] for a frame: 1 if the point is in the object's mask, else 0."""
        rows = [[inside(p.x, p.y, mask) for p in self.points[frame]] for mask in self.masks[frame].values()]
        return np.array(rows, float).reshape(len(rows), len(self.points[frame]))


def _times(row: Mapping[str, Any], fps: float) -> list[float]:
    """The times of the compared frames, in seconds: `fps` of them per second, as far as there are masks."""
    num_frames = max((len(stored) for stored in row["masks"]), default=0)
    if not num_frames or row["fps"] <= 0:
        raise ValueError(f"tracks need masks at a frame rate, found {num_frames} frames at {row['fps']} per second")
    last = (num_frames - 1) / row["fps"]
    return [i / fps for i in range(int(last * fps + 1e-6) + 1)]


def track_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """F1 of points in masks over all frames, with Hungarian matching in each; points at other times count as wrong."""
    scene = _Scene(prediction, asked, row)
    right = sum(most_pairs(scene.similarity(i) > 0) for i in range(len(scene.times)))
    num_points = sum(map(len, scene.points)) + scene.num_elsewhere
    return Score(f1(right, num_points, sum(map(len, scene.masks))))


def _numbered(ids: Sequence[Sequence[int]]) -> tuple[list[npt.NDArray[np.int64]], int]:
    """The ids of each frame renumbered from 0 without gaps, and the number of different ids."""
    numbers = {i: number for number, i in enumerate(sorted({i for frame in ids for i in frame}))}
    return [np.array([numbers[i] for i in frame], int) for frame in ids], len(numbers)


def hota_data(scene: _Scene) -> dict[str, Any]:
    """The input of `trackeval.metrics.HOTA` for one sequence."""
    expected, num_expected = _numbered([list(masks) for masks in scene.masks])
    predicted, num_predicted = _numbered([[point.id for point in points] for points in scene.points])
    return {
        "num_gt_dets": sum(map(len, expected)),
        "num_tracker_dets": sum(map(len, predicted)),
        "num_gt_ids": num_expected,
        "num_tracker_ids": num_predicted,
        "gt_ids": expected,
        "tracker_ids": predicted,
        "similarity_scores": [scene.similarity(frame) for frame in range(len(scene.times))],
    }


def hota(answers: Sequence[Answered]) -> float:
    """HOTA over all answers, averaged over its thresholds; the similarity is 1 for a point in the mask, else 0."""
    from trackeval.metrics import HOTA  # extra "eval"

    metric = HOTA()
    scenes = (_Scene(answer.prediction, answer.asked, answer.row) for answer in answers)
    sequences = {number: metric.eval_sequence(hota_data(scene)) for number, scene in enumerate(scenes)}
    return float(np.mean(metric.combine_sequences(sequences)["HOTA"]))
