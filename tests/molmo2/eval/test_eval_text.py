"""Metrics of short answers against examples that are worked out here."""

import random

import pytest
from edit_distance import edits

from molmo2.eval.metrics.text_scores import (
    anls,
    answer_or_choice,
    direct_answer,
    number_of,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_normal,
)
from shards.schema import Choice, Text


def asked(answer: str = "") -> Text:
    return Text(style="vqa2", question="?", answer=answer)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("an apple a day", "apple day"),
        ("black-and-white", "black and white"),  # no space beside the dash: it becomes one
        ("black - white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("mr. smith", "mr smith"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yes\n", "yes"),
        ("red, blue", "red blue"),
        ("what?", "what"),
    ],
)
def test_normal_form(text, normal):
    assert vqa_normal(text) == normal


def test_vqa_leaves_one_out():
    """Three of ten say "red". Leaving out one of them: 2 others, 2/3. Else 3 others, 1. (3 * 2/3 + 7 * 1) / 10."""
    row = {"answers": ["red"] * 3 + ["blue"] * 6 + ["green"]}
    assert vqa_accuracy("The red.", asked(), row).value == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("blue", asked(), row).value == 1
    assert vqa_accuracy("green", asked(), row).value == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("pink", asked(), row).value == 0


def test_vqa_of_counts():
    """The closed form of n people in ten: n leave out themselves, 10 - n do not."""
    for n in range(11):
        expected = (n * min(1, (n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10
        row = {"answers": [{"answer": "yes"}] * n + [{"answer": f"no{i}"} for i in range(10 - n)]}
        assert vqa_accuracy("yes", asked(), row).value == pytest.approx(expected)


def test_direct_answer_leaves_nobody_out():
    assert direct_answer("red", asked(), {"answers": ["red", "red", "blue"]}).value == pytest.approx(2 / 3)
    assert direct_answer("red", asked(), {"answers": ["red"] * 4}).value == 1


def test_one_answer_and_no_answer():
    assert vqa_accuracy("a dog", asked("dog"), {}).value == 1
    with pytest.raises(ValueError, match="without answers"):
        vqa_accuracy("a dog", asked("dog"), {"answers": []})


def test_anls_worked():
    """ "hello wrld" needs one letter of eleven: 1 - 1/11. "ab" to "abcd" is 2 of 4, not below one half: 0."""
    assert anls("Hello  wrld", asked("hello world"), {}).value == pytest.approx(10 / 11)
    assert anls("ab", asked("abcd"), {}).value == 0
    assert anls("abc", asked("abcd"), {}).value == pytest.approx(3 / 4)
    assert anls("x", asked(), {"answers": ["yyyy", "X"]}).value == 1


def test_anls_on_random_texts():
    rng = random.Random(0)
    for _ in range(200):
        said, right = ("".join(rng.choices("ab", k=rng.randint(1, 8))) for _ in range(2))
        far = edits(said, right) / max(len(said), len(right))
        assert anls(said, asked(right), {}).value == pytest.approx(1 - far if far < 0.5 else 0)


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("12%", "0.12", 1),
        ("1,020", "1000", 0),  # no number by the published rule
        (" 105 ", "100", 1),
        ("105.", "100", 1),
        ("yes.", "yes", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("yes it is", "yes", 0),
    ],
)
def test_relaxed(said, right, value):
    assert relaxed_accuracy(said, asked(right), {}).value == value


def test_numbers():
    assert number_of("1,200.") == 1200
    assert number_of("12 %") == pytest.approx(0.12)
    assert number_of("twelve") is None


def test_answer_or_choice():
    options = Choice(style="mc", question="?", options=("1.5", "2"), answer=1)
    assert answer_or_choice("B", options, {}).value == 1
    assert answer_or_choice("2.50", asked("2.5"), {}).value == 1
    assert answer_or_choice("2.6", asked("2.5"), {}).value == 0
    assert answer_or_choice("Left.", asked("left"), {}).value == 1
