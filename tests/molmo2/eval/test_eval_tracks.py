"""Tracks and captions: worked examples and the reference implementations on random cases."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from trackeval.metrics import HOTA

from molmo2.eval.metrics.caption_scores import cider, rouge_l, words
from molmo2.eval.metrics.scores import Answered
from molmo2.eval.metrics.track_scores import hota, track_f1
from shards.schema import Text, Tracks

ASKED = Tracks(style="video_track", label="dogs", fps=1.0, groups=())
SIZE = 10
NONE = "No tracks available."


def square(x: int, y: int) -> list[list[int]]:
    """A mask of 2 x 2 pixels of a picture of 10 x 10."""
    mask = np.zeros((SIZE, SIZE), int)
    mask[y : y + 2, x : x + 2] = 1
    return mask.tolist()


def tracks(*frames: str) -> str:
    return f'<tracks coords="{";".join(frames)}">dogs</tracks>'


# two objects over three seconds at two frames a second; the second one leaves after two
ROW = {"fps": 2, "masks": [[square(0, 0)] * 5, [square(8, 8)] * 3 + [None] * 2]}
FULL = tracks("0.0 1 100 100 2 900 900", "1.0 1 100 100 2 900 900", "2.0 1 100 100")
SWAPPED = tracks("0.0 1 100 100 2 900 900", "1.0 2 100 100 1 900 900", "2.0 1 100 100")


def test_track_f1_worked():
    """Five points are wanted. All: 1. Four and one wrong: 2*4/(5+5). Said between the frames: 2*5/(6+5)."""
    assert track_f1(FULL, ASKED, ROW).value == 1
    assert track_f1(SWAPPED, ASKED, ROW).value == 1  # ids do not count here
    assert track_f1(FULL.replace("2.0 1 100", "2.0 1 500"), ASKED, ROW).value == pytest.approx(8 / 10)
    assert track_f1(FULL.replace("2.0", "0.5 1 100 100;2.0"), ASKED, ROW).value == pytest.approx(10 / 11)
    assert track_f1(NONE, ASKED, ROW).value == 0
    with pytest.raises(ValueError, match="frame rate"):
        track_f1(NONE, ASKED, {"fps": 2, "masks": []})


def test_hota_worked():
    """Swapped ids. DetA is 1. Object 1 (3 frames) is 2 times track 1 (3) and once track 2 (2), object 2 (2) once each.

    A match's association: TPA / (both lengths - TPA): (1,1) 2/(3+3-2) twice, (1,2) 1/(3+2-1), (2,2) 1/(2+2-1),
    (2,1) 1/(2+3-1). Mean of the five: (1/2 + 1/2 + 1/4 + 1/3 + 1/4) / 5 = 11/30. HOTA = sqrt(DetA * AssA).
    """
    assert hota([Answered(FULL, ASKED, ROW)]) == pytest.approx(1)
    assert hota([Answered(SWAPPED, ASKED, ROW)]) == pytest.approx((11 / 30) ** 0.5)
    assert hota([Answered(NONE, ASKED, ROW)]) == 0
    both = hota([Answered(FULL, ASKED, ROW), Answered(NONE, ASKED, ROW)])
    assert both == pytest.approx(0.5**0.5)  # DetA 5/10, AssA 1


def test_hota_of_random_tracks_is_trackevals():
    rng = np.random.default_rng(1)
    for _ in range(20):
        places = rng.integers(0, 4, size=(3, 4, 2)) * 2  # objects, frames, (x, y)
        row = {"fps": 1, "masks": [[square(*p) for p in frames] for frames in places]}
        spots = rng.integers(0, 4, size=(4, 2, 2)) * 2  # frames, tracks, (x, y)
        said = tracks(*(f"{t}.0 " + " ".join(f"{i + 1} {100 * x + 50:03d} {100 * y + 50:03d}"
                        for i, (x, y) in enumerate(frame)) for t, frame in enumerate(spots)))  # fmt: skip
        data = {
            "num_gt_dets": 12, "num_tracker_dets": 8, "num_gt_ids": 3, "num_tracker_ids": 2,
            "gt_ids": [np.arange(3)] * 4, "tracker_ids": [np.arange(2)] * 4,
            "similarity_scores": [(places[:, t, None] == spots[None, t]).all(-1).astype(float) for t in range(4)],
        }  # fmt: skip
        assert hota([Answered(said, ASKED, row)]) == pytest.approx(np.mean(HOTA().eval_sequence(data)["HOTA"]))


def caption(answer: str) -> Text:
    return Text(style="long_caption", answer=answer)


def test_rouge_worked():
    """Common subsequence "a c d" of "a b c d" and "a c d e": P = R = 3/4, so F = 3/4. Words: no case, no signs."""
    assert rouge_l("A, b c d!", caption("a c d e"), {}).value == pytest.approx(3 / 4)
    assert rouge_l("x", caption("a c d e"), {}).value == 0
    assert words("It's a DOG -- 2 of them.") == "it's a dog 2 of them"


def test_rouge_of_other_lengths():
    """ "a b" for "a b c d": P 1, R 1/2, F = (1 + 1.44) P R / (R + 1.44 P)."""
    assert rouge_l("a b", caption("a b c d"), {}).value == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))


def test_cider_is_the_packages_own_and_of_the_whole_corpus():
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(list("abcdefgh"), size=9)) for _ in range(12)]
    said, right = texts[:6], texts[6:]
    right[0] = said[0]
    answers = [Answered(s.upper() + ".", caption(r), {}) for s, r in zip(said, right, strict=True)]
    expected = Cider().compute_score({i: [r] for i, r in enumerate(right)}, {i: [s] for i, s in enumerate(said)})[0]
    assert cider(answers) == pytest.approx(expected)
    assert cider([Answered(r, caption(r), {}) for r in right]) == pytest.approx(10)
    mean_alone = np.mean([cider([answer]) for answer in answers])
    assert mean_alone != pytest.approx(expected)
