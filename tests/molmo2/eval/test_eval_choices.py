"""Which option an answer names: a table of cases, the forms that training teaches, and the official metric's rule."""

import itertools

import numpy as np
import pytest
from edit_distance import edits

from molmo2.eval.metrics.choices import choice_of, multiple_choice
from molmo2.processing.choice import render_choice
from shards.schema import Choice

DIGITS = ("7", "0", "8", "left")
ANIMALS = ("It sits", "A dog runs", "A cat")
TEN = tuple("apple bread cheese dates eggs figs grapes honey ice jam".split())
VITAMINS = ("vitamin C", "vitamin D", "iron", "zinc")
ROOMS = ("a dog", "a dog house", "the garden", "the U.S. embassy")


@pytest.mark.parametrize(
    ("text", "options", "index"),
    [
        # a label first
        ("B. 0", DIGITS, 1),
        ("(c) 8", DIGITS, 2),
        ("D", DIGITS, 3),
        ("d", DIGITS, 3),
        (" B.", DIGITS, 1),
        ("[B]", DIGITS, 1),
        ("(B).", DIGITS, 1),
        ("**B**", DIGITS, 1),
        ("B: 7", DIGITS, 1),  # the label counts if label and text differ
        ("A, because it is there", DIGITS, 0),
        ("E. 9", DIGITS, None),
        ("E", DIGITS, None),
        ("J", TEN, 9),
        # the text
        ("8", DIGITS, 2),
        ("Left.", DIGITS, 3),
        ("a", ("a", "b"), 0),
        ("B", ("C", "B", "A"), 1),  # here the letters are the texts
        ("a cat", ANIMALS, 2),
        ("A cat.", ANIMALS, 2),
        ("3", DIGITS, None),  # no label, since the options have digits
        ("3.5", ("cat", "dog", "cow", "hen"), None),
        # articles and pronouns are no labels
        ("A dog is running", ANIMALS, 1),
        ("A zebra", ANIMALS, None),
        ("I think B", TEN, 1),
        ("I think it is the honey", TEN, 7),
        ("I", TEN, 8),
        ("I do not know", TEN, None),
        # a label in a sentence
        ("The answer is B", DIGITS, 1),
        ("The answer is B.", DIGITS, 1),
        ("The correct answer is (B) 0.", DIGITS, 1),
        ("Answer: B", DIGITS, 1),
        ("It is not A or B, both are wrong.\nAnswer: C. 8", DIGITS, 2),
        ("The correct option is A because it fits.", TEN, 0),
        ("Option A is right", TEN, 0),
        ("The answer is A dog runs", ANIMALS, 1),
        ("A and B differ, so the answer is C, unlike D", DIGITS, 2),
        ("Between (A) and (B), I take (B)", TEN, 1),
        ("It must be C!", TEN, 2),
        # a letter within a text is no label
        ("It has vitamin C", VITAMINS, 0),
        ("It has Vitamin D.", VITAMINS, 1),
        ("the U.S. embassy, I think", ROOMS, 3),
        # a part of the text
        ("the dog runs", ANIMALS, 1),
        ("It sits on a chair", ANIMALS, 0),
        ("in the garden", ROOMS, 2),
        ("garden", ROOMS, 2),
        ("It lives in a dog house.", ROOMS, 1),
        ("jam or honey", TEN, 9),  # the official rule: the answer begins with it
        ("both jam and honey", TEN, None),
        # nothing
        ("", DIGITS, None),
        ("  \n", DIGITS, None),
        ("...", DIGITS, None),
        ("qqq xyz", TEN, None),
    ],
)
def test_choice_of(text: str, options: tuple[str, ...], index: int | None) -> None:
    assert choice_of(text, options) == index


@pytest.mark.parametrize("text", ["A", "a", "(A)", "The answer is A.", "It is A because of the arrow", "Answer: A"])
def test_options_that_are_letters_are_named_by_themselves(text: str) -> None:
    """Letters drawn on a diagram, in the order of the question."""
    assert choice_of(text, ("E", "B", "A", "F"), labelled=False) == 2
    asked = Choice(style="ai2_diagram", question="?", options=("E", "B", "A", "F"), answer=2, labelled=False)
    assert multiple_choice(text, asked, {}).value == 1
    assert choice_of("C", ("E", "B", "A", "F"), labelled=False) is None


def test_the_chance_level_follows_from_the_number_of_options() -> None:
    asked = Choice(style="video_multiple_choice", question="?", options=DIGITS, answer=1)
    assert [multiple_choice(text, asked, {}).value for text in ("B. 0", "C. 8")] == [1, 0]
    assert multiple_choice("B. 0", asked, {}).chance == 0.25


def choices(rng: np.random.Generator, labelled: bool = True) -> Choice:
    """A question with 2 to 8 options of one to three different words each."""
    vocabulary = rng.permutation(
        "a the dog cat runs house garden red blue I on under tree Bob mixes vivid ice C".split()
    )
    texts = [" ".join(words) for words in itertools.permutations(vocabulary[:6], int(rng.integers(1, 4)))]
    options = [str(text) for text in rng.permutation([text for text in texts if len(text) > 1])]
    options = options[: int(rng.integers(2, 9))]
    return Choice(
        style="science_qa",
        question="Which?",
        options=tuple(options),
        answer=int(rng.integers(len(options))),
        labelled=labelled,
    )


def test_every_form_of_answer_that_training_teaches_parses_back() -> None:
    """Fixed form, label alone, label and text, text alone; four kinds of labels, five kinds of marks."""
    rng, forms = np.random.default_rng(0), set()
    for _ in range(400):
        asked = choices(rng)
        prompt, answer = render_choice(asked, rng)
        assert choice_of(answer, asked.options) == asked.answer, (prompt, answer)
        if answer not in asked.options:
            forms.add("".join("X" if mark.isalnum() else mark for mark in answer.split()[0]))
        else:
            forms.add("text")
        assert choice_of(render_choice(asked, None)[1], asked.options) == asked.answer
        unlabelled = choices(rng, labelled=False)
        assert choice_of(render_choice(unlabelled, rng)[1], unlabelled.options, False) == unlabelled.answer
    assert {"text", "X", "X.", "X)", "(X)", "X:", "[X]"} <= forms


def test_a_blank_option_is_answered_by_its_label() -> None:
    rng = np.random.default_rng(1)
    asked = Choice(style="science_qa", question="Which?", options=("", "", ""), answer=1)
    for _ in range(50):
        assert choice_of(render_choice(asked, rng)[1], asked.options) == 1


def official_choice(answer: str, options: list[str]) -> int:
    """Molmo's rule, written from its description: equal, prefixes both ways, contained, least edit distance."""
    answer, options = answer.lower().strip(), [option.lower().strip() for option in options]
    if answer in options:
        return options.index(answer)
    for fits in (
        [answer.startswith(option) for option in options],
        [option.startswith(answer) for option in options],
        [answer in option for option in options],
    ):
        if sum(fits) == 1:
            return fits.index(True)
    return int(np.argmin([edits(answer, option) for option in options]))


def test_answers_of_the_prompts_form_score_as_with_the_official_rule() -> None:
    """Answers of the form that evaluation asks for, whole, without the text, cut off, or with more after them."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        asked = choices(rng)
        letters = [chr(ord("a") + i) for i in range(len(asked.options))]
        number = int(rng.integers(len(letters)))
        whole = f"{letters[number].upper()}. {asked.options[number]}"
        for answer in (whole, whole[:1], whole[:2], whole[:-1], f"{whole}\n", f"{whole}. It fits."):
            assert choice_of(answer, asked.options) == official_choice(answer, letters) == number, answer


def test_answers_without_a_label_score_as_with_the_official_rule() -> None:
    """The official rule over the texts of the options, for answers that name one of them."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        asked = choices(rng)
        text = asked.options[int(rng.integers(len(asked.options)))]
        for answer in (text, text.upper(), f" {text} "):
            assert choice_of(answer, asked.options) == official_choice(answer, list(asked.options)), answer
