"""Metrics held to other implementations on random cases: lmms-eval's copies of the official code, and brute force."""

import importlib.util
import itertools
import random
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from molmo2.eval.metrics.choices import choice_of
from molmo2.eval.metrics.point_scores import count_close, point_f1, video_point_f1
from molmo2.eval.metrics.scores import count_exact, read_count
from molmo2.eval.metrics.text_scores import anls, direct_answer, relaxed_accuracy, vqa_accuracy, vqa_normal
from molmo2.processing.prompts import render_messages
from shards.schema import PointGroup, Points, Text

lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make install-dev installs it"
)
ASKED = Text(style="vqa2", question="?", answer="")


def answers_of(rng: random.Random, words: list[str], most: int = 4) -> str:
    """A text of words and marks, joined by spaces or not."""
    marks = [*";/[]\"{}()=+\\_-><@`,?!.'%:", "\n", "\t", "  "]
    parts = [rng.choice(words) + (rng.choice(marks) if rng.random() < 0.3 else "") for _ in range(rng.randint(1, most))]
    return rng.choice([" ", " ", "", "-", ", "]).join(parts)


@lmms
def test_vqa_accuracy_is_the_official_evaluations() -> None:
    """Every word of its tables, articles, numbers and marks; ten people who partly agree."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor as Official
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    rng, tables = random.Random(0), Official.CONTRACTIONS
    words = [*tables, *tables.values(), *Official.NUMBER_MAP, *Official.ARTICLES]
    words += "The dog 1,000 3.5 mr. St. red id im lets shes A TWO 12% couldntve".split()
    official = Official()
    for word in words:
        assert vqa_normal(word) == official.process_digit_article(official.process_punctuation(word)), word
    seen = set()
    for _ in range(1000):
        pool = [answers_of(rng, words) for _ in range(3)]
        people, predicted = [rng.choice(pool) for _ in range(10)], rng.choice(pool)
        doc: dict[str, Any] = {"answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(people)]}
        expected = vqav2_process_results({**doc, "question_id": 0}, [predicted])["exact_match"]
        assert vqa_accuracy(predicted, ASKED, {"answers": people}).value == pytest.approx(expected), (predicted, people)
        seen.add(round(expected, 2))
    assert {0.0, 1.0} < seen and len(seen) > 4


def test_direct_answers_are_compared_without_a_normal_form() -> None:
    """A-OKVQA: min(1, people with just this answer / 3); "two" is not "2", and "the dog" is not "dog"."""
    rng = random.Random(1)
    for _ in range(300):
        pool = [answers_of(rng, ["dog", "the", "two", "2", "Dog"], 2) for _ in range(3)]
        people, predicted = [rng.choice(pool) for _ in range(10)], rng.choice(pool)
        agreeing = sum(answer.strip().lower() == predicted.strip().lower() for answer in people)
        assert direct_answer(predicted, ASKED, {"answers": people}).value == min(agreeing / 3, 1)


@lmms
def test_anls_is_the_reference() -> None:
    """Except where exactly half differs: the paper's and Molmo's rule gives 0 there, the reference here 0.5."""
    from lmms_eval.api.metrics import anls as reference

    rng, halves = random.Random(2), 0
    for _ in range(1000):
        right = ["".join(rng.choices("abAB1", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 3))]
        predicted = "".join(rng.choices("abAB1", k=rng.randint(1, 9)))
        expected = float(reference(right, [predicted])["anls"])
        halves += expected == 0.5
        value = anls(predicted, ASKED, {"answers": right}).value
        assert value == pytest.approx(0 if expected == 0.5 else expected), (predicted, right)
    assert halves


@lmms
def test_relaxed_accuracy_is_the_reference() -> None:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    rng, right = random.Random(3), 0
    numbers = [str(n) for n in range(-20, 130, 5)] + ["0", "0.0", "1,000", "1000", "12%", "0.12", "12 %", "1e3", "Yes"]
    numbers += ["yes", "12.6%", "0.126", "$5", "5", "5.25", "5.2500001", "", "nan", "inf", "%", "yes."]
    for predicted, answer in itertools.product(numbers, numbers):
        expected = float(relaxed_correctness(predicted, answer))
        assert relaxed_accuracy(predicted, ASKED, {"answers": [answer]}).value == expected, (predicted, answer)
        right += expected
    assert len(numbers) < right < len(numbers) ** 2 / 2
    for _ in range(500):
        answer = rng.uniform(-10, 10)
        predicted = str(answer * rng.uniform(0.9, 1.1))
        expected = float(relaxed_correctness(predicted, str(answer)))
        assert relaxed_accuracy(predicted, ASKED, {"answers": [str(answer)]}).value == expected


@lmms
def test_labels_in_sentences_are_read_as_by_mmmu() -> None:
    """Its parser draws at random without a label; these answers have one, in brackets or alone, or several."""
    from lmms_eval.tasks._task_utils.mmmu_mcq_utils import parse_mmmu_multi_choice_response as official

    rng = random.Random(4)
    options = ["red house", "blue sky", "green tree", "the dog runs", "seven"]
    letters = "ABCDE"
    forms = [
        "{0}",
        "({0})",
        "{0}.",
        "The answer is {0}",
        "The answer is ({0}).",
        "Not {1} but {0}",
        "({1}) or ({0}), so ({0})",
    ]
    forms += [
        "So the correct option is {0} , I think",
        "It has to be {0} and nothing else",
        "because {1} fails, ({0})",
    ]
    for _ in range(500):
        first, second = rng.sample(letters, 2)
        answer = rng.choice(forms).format(first, second)
        expected = official(answer, list(letters), dict(zip(letters, options, strict=True)))
        number = choice_of(answer, options)
        assert number is not None and letters[number] == expected == first, answer


def test_every_form_of_a_count_that_training_teaches_parses_back() -> None:
    """Points then count, count then points, only the count, and none; images and videos, in all templates."""
    rng = np.random.default_rng(5)
    styles = "point_count count_then_point count video_point_count video_count_point video_count".split()
    for style, number, _ in itertools.product(styles, (0, 1, 2, 11, 40), range(8)):
        video = style.startswith("video")
        places = rng.integers(0, 1001, (number, 2)) / 1000
        groups = (PointGroup(at=1, points=tuple(map(tuple, places.tolist()))),) if number else ()
        asked = Points(style=style, label="7 dogs in 2 rows", groups=groups)
        for draw in (rng, None):
            _, answer = render_messages(asked, "sft" if draw else "eval", draw, video=video)
            assert read_count(answer.content) == number, answer.content
            assert count_exact(answer.content, asked, {}).value == 1
    for wanted, said in itertools.product(range(0, 200, 7), range(0, 220, 3)):
        asked = Text(style="count", question="?", answer=str(wanted))
        assert count_close(str(said), asked, {}).value == (abs(said - wanted) <= 1 + int(0.05 * wanted + 1e-9))


def best_f1(allowed: np.ndarray, num_points: int, num_objects: int) -> float:
    """F1 of the best of all assignments, from its precision and recall."""
    if not num_points and not num_objects:
        return 1.0
    wide = allowed if allowed.shape[0] <= allowed.shape[1] else allowed.T
    ways = itertools.permutations(range(wide.shape[1]), wide.shape[0])
    right = max(sum(wide[i, j] for i, j in enumerate(way)) for way in ways)
    precision, recall = right / max(num_points, 1), right / max(num_objects, 1)
    return 2 * precision * recall / (precision + recall) if right else 0.0


def test_video_points_score_as_by_trying_all_assignments() -> None:
    """A 3 s window around the object's time, and its mask of the frame (2 per second) nearest to the point's time."""
    rng, seen = np.random.default_rng(6), set()
    for _ in range(200):
        num_objects, num_points = rng.integers(1, 4), rng.integers(0, 4)
        masks = rng.random((num_objects, 12, 4, 4)) < 0.5  # object, frame, y, x
        times = rng.integers(0, 12, num_objects) / 2
        points = sorted(
            (int(f) / 2, int(x), int(y)) for f, x, y in rng.integers((0, 0, 0), (12, 4, 4), (num_points, 3))
        )
        row = {
            "times": times.tolist(),
            "masks": [
                [{"frame_id": f, "rle": coco.encode(np.asfortranarray(m, np.uint8))} for f, m in enumerate(frames)]
                for frames in masks
            ],
        }
        coords = ";".join(f"{t:.1f} {i} {250 * x + 125} {250 * y + 125}" for i, (t, x, y) in enumerate(points, 1))
        text = f'<points coords="{coords}">x</points>' if points else "There are none."
        allowed = np.zeros((num_objects, len(points)), bool)
        for i, (j, (t, x, y)) in itertools.product(range(num_objects), enumerate(points)):
            allowed[i, j] = abs(t - times[i]) <= 1.5 and masks[i, int(2 * t), y, x]
        expected = best_f1(allowed, len(points), num_objects)
        assert video_point_f1(text, ASKED, row).value == pytest.approx(expected)
        image = {"masks": masks[:, 0].tolist()}
        inside = np.array([[m[y, x] for _, x, y in points] for m in masks[:, 0]]).reshape(num_objects, len(points))
        assert point_f1(text, ASKED, image).value == pytest.approx(best_f1(inside, len(points), num_objects))
        seen.add(round(expected, 2))
    assert len(seen) > 5
