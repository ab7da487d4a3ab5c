"""Counting within a tolerance, and points against masks, in images and in videos.

A mask is a nested list or an array [height, width], or COCO run lengths ({"size", "counts"}). A point lies in the pixel
that holds it. Boxes are in `metrics`, tracks in `metrics_tracks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from molmo2.eval.metrics.scores import Score, asked_count, read_count
from molmo2.processing.points import ParsedPoint, parse_points
from shards.schema import Annotation

MASK_FPS: Final = 2.0  # masks of the video pointing benchmark carry frame numbers at this rate
WINDOW: Final = 1.5  # seconds before and after the annotated moment
Mask = npt.NDArray[np.bool_]


def count_close(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Off by at most 1 + floor(5 % of the right number)."""
    found, wanted = read_count(prediction), asked_count(asked)
    return Score(float(found is not None and abs(found - wanted) <= 1 + wanted // 20))


def mask_of(stored: Any) -> Mask:
    """A mask as bool [height, width].

    Raises:
        ValueError: neither run lengths nor rows of equal length.
    """
    if isinstance(stored, Mapping):
        from pycocotools import mask as coco  # extra "eval"

        counts = stored["counts"]
        if isinstance(counts, list):
            return coco.decode(coco.frPyObjects(dict(stored), *stored["size"])).astype(bool)
        return coco.decode({**stored, "counts": counts.encode() if isinstance(counts, str) else counts}).astype(bool)
    try:
        found = np.asarray([np.asarray(line) for line in stored]).astype(bool)
    except ValueError as error:
        raise ValueError(f"a mask must be run lengths or rows of equal length: {error}") from None
    if found.ndim != 2:
        raise ValueError(f"a mask must have height and width, found shape {found.shape}")
    return found


def inside(x: float, y: float, mask: Mask) -> bool:
    """Whether the point at fractions x, y of the mask's width and height lies in it; 1.0 is the last pixel."""
    height, width = mask.shape
    return bool(mask[min(int(y * height), height - 1), min(int(x * width), width - 1)])


def most_pairs(allowed: npt.NDArray[np.bool_]) -> int:
    """Largest number of allowed (row, column) pairs in which no row and no column appears twice."""
    from scipy.optimize import linear_sum_assignment  # extra "eval"

    if not allowed.size:
        return 0
    rows, columns = linear_sum_assignment(allowed, maximize=True)
    return int(allowed[rows, columns].sum())


def f1(num_right: int, num_predicted: int, num_wanted: int) -> float:
    """Harmonic mean of precision and recall; 1 where nothing was wanted and nothing predicted."""
    return 2 * num_right / (num_predicted + num_wanted) if num_predicted + num_wanted else 1.0


def point_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """F1 of points against `row["masks"]`, one for each object; every object takes one point (Hungarian matching)."""
    masks = [mask_of(mask) for mask in row["masks"]]
    points = parse_points(prediction)
    allowed = np.array([[inside(p.x, p.y, mask) for p in points] for mask in masks], bool)
    return Score(f1(most_pairs(allowed), len(points), len(masks)))


def all_in_mask(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """There is a point, and all lie in `row["masks"]`, one mask. Chance: one random point."""
    (mask,) = map(mask_of, row["masks"])
    points = parse_points(prediction)
    return Score(float(bool(points) and all(inside(p.x, p.y, mask) for p in points)), float(mask.mean()))


def _in_window(point: ParsedPoint, moment: float, masks: Sequence[Mapping[str, Any]]) -> bool:
    if abs(point.at - moment) > WINDOW:
        return False
    near = (one for one in masks if abs(one["frame_id"] / MASK_FPS - point.at) <= 0.5 / MASK_FPS)
    return any(inside(point.x, point.y, mask_of(one["rle"])) for one in near)


def video_point_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """F1 of points with times, Hungarian matching.

    A point hits an object within 1.5 s of its `row["times"]` where it lies in a mask of `row["masks"]` (for each
    object a list of {"frame_id" at 2 fps, "rle"}) whose frame is the one that it names.
    """
    points, times, masks = parse_points(prediction), row["times"], row["masks"]
    if len(times) != len(masks):
        raise ValueError(f"{len(times)} times and {len(masks)} objects with masks; each object needs both")
    allowed = np.array([[_in_window(p, t, m) for p in points] for t, m in zip(times, masks, strict=True)], bool)
    return Score(f1(most_pairs(allowed), len(points), len(times)))
