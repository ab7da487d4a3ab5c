"""Metrics of points: counting within a tolerance, and points against masks, in images and in videos.

A mask is a nested list or an array [height, width], or COCO run lengths ({"size", "counts"}). A point is in a mask if
its pixel is. Metrics of boxes are in `scores`, those of tracks in `track_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from molmo2.eval.metrics.scores import Score, read_count, right_count
from molmo2.processing.points import ParsedPoint, parse_points
from shards.schema import Annotation

MASK_FPS: Final = 2.0  # frame rate of the frame numbers in the video pointing benchmark's masks
WINDOW: Final = 1.5  # a point counts up to this many seconds before and after the annotated time
Mask = npt.NDArray[np.bool_]


def count_close(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """1 if the predicted number is off by at most 1 + floor(5 % of the right number)."""
    predicted, expected = read_count(prediction), right_count(asked)
    return Score(float(predicted is not None and abs(predicted - expected) <= 1 + expected // 20))


def mask_of(stored: Any) -> Mask:
    """Convert a stored mask to bool [height, width].

    Raises:
        ValueError: the mask is neither run lengths nor rows of equal length.
    """
    if isinstance(stored, Mapping):
        from pycocotools import mask as coco  # extra "eval"

        counts = stored["counts"]
        if isinstance(counts, list):
            return coco.decode(coco.frPyObjects(dict(stored), *stored["size"])).astype(bool)
        return coco.decode({**stored, "counts": counts.encode() if isinstance(counts, str) else counts}).astype(bool)
    try:
        mask = np.asarray([np.asarray(line) for line in stored]).astype(bool)
    except ValueError as error:
        raise ValueError(f"a mask must be run lengths or rows of equal length: {error}") from None
    if mask.ndim != 2:
        raise ValueError(f"a mask must have height and width, found shape {mask.shape}")
    return mask


def inside(x: float, y: float, mask: Mask) -> bool:
    """Whether the point at fractions x, y of the mask's width and height is in the mask; 1.0 is the last pixel."""
    height, width = mask.shape
    return bool(mask[min(int(y * height), height - 1), min(int(x * width), width - 1)])


def most_pairs(allowed: npt.NDArray[np.bool_]) -> int:
    """The largest number of allowed (row, column) pairs in which no row and no column appears twice."""
    from scipy.optimize import linear_sum_assignment  # extra "eval"

    if not allowed.size:
        return 0
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    return int(allowed[rows, columns].sum())


def f1(num_right: int, num_predicted: int, num_wanted: int) -> float:
    """Harmonic mean of precision and recall; 1 if nothing was expected and nothing predicted."""
    return 2 * num_right / (num_predicted + num_wanted) if num_predicted + num_wanted else 1.0


def point_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """F1 of points against `row["masks"]`, one mask for each object; each object matches one point (Hungarian)."""
    masks = [mask_of(mask) for mask in row["masks"]]
    points = parse_points(prediction)
    allowed = np.array([[inside(p.x, p.y, mask) for p in points] for mask in masks], bool)
    return Score(f1(most_pairs(allowed), len(points), len(masks)))


def all_in_mask(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """1 if there is a point and all points are in the one mask of `row["masks"]`. Chance is for one random point."""
    (mask,) = map(mask_of, row["masks"])
    points = parse_points(prediction)
    return Score(float(bool(points) and all(inside(p.x, p.y, mask) for p in points)), float(mask.mean()))


def _in_window(point: ParsedPoint, moment: float, masks: Sequence[Mapping[str, Any]]) -> bool:
    if abs(point.at - moment) > WINDOW:
        return False
    near = (mask for mask in masks if abs(mask["frame_id"] / MASK_FPS - point.at) <= 0.5 / MASK_FPS)
    return any(inside(point.x, point.y, mask_of(mask["rle"])) for mask in near)


def video_point_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """F1 of points with times, by Hungarian matching.

    A point can match an object if its time is within 1.5 s of the object's `row["times"]`, and it is in the object's
    mask of the frame at its time. `row["masks"]` has for each object a list of {"frame_id" at 2 fps, "rle"}.
    """
    points, times, masks = parse_points(prediction), row["times"], row["masks"]
    if len(times) != len(masks):
        raise ValueError(f"{len(times)} times and {len(masks)} objects with masks; each object needs both")
    allowed = np.array([[_in_window(p, t, m) for p in points] for t, m in zip(times, masks, strict=True)], bool)
    return Score(f1(most_pairs(allowed), len(points), len(times)))
