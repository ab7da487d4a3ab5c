"""Options and lists that a column holds as text."""

import pytest

from shards.convert.answer_options import listed, named_images, option_lines, right_option
from shards.schema import RejectedError


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, []),
        ("", []),
        (["a", "b"], ["a", "b"]),
        ("['a', \"b's\"]", ["a", "b's"]),
        ("A: one\nB: two", ["one", "two"]),
        ("A: one\nC: two", ["A: one\nC: two"]),
        (12, ["12"]),
        (["A. one", "B. two"], ["one", "two"]),
        (["Caption A: one", "Caption B: two"], ["one", "two"]),
        (["A. one", "two"], ["A. one", "two"]),
        (["A. C. Clarke"], ["A. C. Clarke"]),
    ],
)
def test_lists_are_read_from_text(value: object, found: list[str]) -> None:
    assert listed(value) == found


def test_a_broken_list_is_rejected_and_no_code_runs() -> None:
    for text in ("['a', ", "[print('ran')]"):
        with pytest.raises(RejectedError, match="neither a list nor text"):
            listed(text)


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Who?\nA. me\nB. you", "Who?", ["me", "you"]),
        ("Who?\n\n(A) me\n(B) you\n", "Who?", ["me", "you"]),
        ("A. C. Clarke wrote it?", "A. C. Clarke wrote it?", []),
        ("A. begins\nnot an option", "A. begins\nnot an option", []),
        ("Who?\nB. me\nC. you", "Who?\nB. me\nC. you", []),
    ],
)
def test_options_at_the_end_of_a_question(text: str, question: str, options: list[str]) -> None:
    assert option_lines(text) == (question, options)


@pytest.mark.parametrize(
    ("how", "answer", "place"),
    [
        ("index", 1, 1),
        ("index", "2.0", 2),
        ("index", "3", None),
        ("index", None, None),
        ("index", -1, None),
        ("text", " b ", 1),
        ("text", "d", None),
        ("letter", "C", 2),
        ("letter", "(B)", 1),
        ("letter", "B. b", 1),
        ("letter", "Caption A: a", 0),
        ("letter", "Option 2: b", 1),
        ("letter", "D", None),
        ("letter", "b", None),
        ("letter", "Because", None),
    ],
)
def test_answers_name_an_option(how: str, answer: object, place: int | None) -> None:
    options = ["a", "b", "c"]
    if place is not None:
        assert right_option(how, answer, options) == place
        return
    with pytest.raises(RejectedError, match="is none of 3 options"):
        right_option(how, answer, options)


def test_marks_name_one_option() -> None:
    assert right_option("marks", ["wrong", "correct"], ["a", "b"]) == 1
    for marks in (["correct", "correct"], ["wrong", "wrong"], None):
        with pytest.raises(RejectedError, match=r"[02] right options, wanted one"):
            right_option("marks", marks, ["a", "b"])


def test_images_are_named_by_their_number_or_in_order() -> None:
    assert named_images(["<image 2> or <image 1>?"]) == ["Image 2 or Image 1?"]
    assert named_images(["Is it <image>?", "<image>", "none", "<image>"]) == [
        "Is it Image 1?", "Image 2", "none", "Image 3"]  # fmt: skip
