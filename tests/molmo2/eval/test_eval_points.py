"""Counting and pointing: worked examples, and matching held to trying all assignments."""

import itertools

import numpy as np
import pytest
from pycocotools import mask as coco

from molmo2.eval.metrics.point_scores import (
    all_in_mask,
    count_close,
    f1,
    inside,
    mask_of,
    most_pairs,
    point_f1,
    video_point_f1,
)
from molmo2.eval.metrics.scores import count_exact
from shards.schema import Text

ASKED = Text(style="count", question="How many?", answer="40")
LEFT = [[1, 1, 0, 0]] * 4
RIGHT = [[0, 0, 1, 1]] * 4


def points(*groups: str) -> str:
    return f'<points coords="{";".join(groups)}">x</points>'


def rle(mask) -> dict:
    return coco.encode(np.asfortranarray(mask, np.uint8))


@pytest.mark.parametrize(("said", "value"), [("43", 1), ("37", 1), ("44", 0), ("36", 0), ("none", 0), ("", 0)])
def test_close_is_one_and_a_twentieth(said, value):
    """1 + floor(0.05 * 40) = 3."""
    assert count_close(said, ASKED, {}).value == value


def test_count_of_an_answer_in_words_is_refused():
    assert count_exact("40", ASKED, {}).value == 1
    with pytest.raises(ValueError, match="states no number"):
        count_close("1", Text(style="count", question="?", answer="many"), {})


def test_masks_in_every_form_are_equal():
    mask = np.zeros((3, 5), bool)
    mask[1, 2:4] = True
    stored = rle(mask)
    plain = {"size": [3, 5], "counts": [7, 1, 2, 1, 4]}  # down the columns: 3 + 3 + 1 off, (1, 2), 2 off, (1, 3), 4 off
    for form in (mask, mask.tolist(), stored, {**stored, "counts": stored["counts"].decode()}, plain):
        assert (mask_of(form) == mask).all()
    with pytest.raises(ValueError, match="mask"):
        mask_of([[1, 0], [1]])
    with pytest.raises(ValueError, match="height and width"):
        mask_of([1, 0])


def test_corners_are_inside_the_picture():
    mask = mask_of([[1, 0], [0, 1]])
    assert inside(0, 0, mask) and inside(1, 1, mask) and not inside(1, 0, mask) and inside(0.49, 0.49, mask)


def test_matching_is_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    for _ in range(200):
        allowed = rng.random(rng.integers(1, 6, size=2)) < 0.4
        wide = allowed if allowed.shape[0] <= allowed.shape[1] else allowed.T
        ways = itertools.permutations(range(wide.shape[1]), wide.shape[0])
        assert most_pairs(allowed) == max(sum(wide[i, j] for i, j in enumerate(way)) for way in ways)


def test_f1_of_points_in_masks():
    """Two masks. Both hit: 1. Both points in the left one: 1 right of 2 and 2, 2*1/4. One hit of one: 2*1/3."""
    row = {"masks": [LEFT, RIGHT]}
    assert point_f1(points("1 1 100 500 2 900 500"), ASKED, row).value == 1
    assert point_f1(points("1 1 100 500 2 200 500"), ASKED, row).value == 0.5
    assert point_f1(points("1 1 100 500"), ASKED, row).value == pytest.approx(2 / 3)
    assert point_f1("There are none.", ASKED, row).value == 0
    assert point_f1("There are none.", ASKED, {"masks": []}).value == 1
    assert point_f1(points("1 1 100 500"), ASKED, {"masks": []}).value == 0
    assert f1(1, 2, 2) == 0.5


def test_all_points_must_lie_in_the_mask():
    row = {"masks": [LEFT]}
    assert all_in_mask(points("1 1 100 500"), ASKED, row).value == 1
    assert all_in_mask(points("1 1 100 500"), ASKED, row).chance == 0.5
    assert all_in_mask(points("1 1 100 500 2 900 500"), ASKED, row).value == 0
    assert all_in_mask("none", ASKED, row).value == 0


def test_video_points_have_a_window_and_the_masks_of_their_frame():
    """The object is left at 2.0 s (frame 4) and right at 3.0 s (frame 6); it is annotated at 2.0 s."""
    row = {"times": [2.0], "masks": [[{"frame_id": 4, "rle": rle(LEFT)}, {"frame_id": 6, "rle": rle(RIGHT)}]]}
    assert video_point_f1(points("2.0 1 100 500"), ASKED, row).value == 1
    assert video_point_f1(points("2.2 1 100 500"), ASKED, row).value == 1
    assert video_point_f1(points("3.0 1 100 500"), ASKED, row).value == 0
    assert video_point_f1(points("3.0 1 900 500"), ASKED, row).value == 1
    assert video_point_f1(points("2.5 1 100 500"), ASKED, row).value == 0  # no mask within a quarter of a second
    late = {"times": [2.0], "masks": [[{"frame_id": 8, "rle": rle(LEFT)}]]}
    assert video_point_f1(points("4.0 1 100 500"), ASKED, late).value == 0  # 2 s after the moment
    assert video_point_f1(points("2.0 1 100 500;3.0 2 900 500"), ASKED, row).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="needs both"):
        video_point_f1("", ASKED, {"times": [], "masks": [[]]})
