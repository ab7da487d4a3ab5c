"""Metrics of short answers: VQA accuracy, ANLS, relaxed accuracy, and answers that may also be options.

The accepted answers are `row["answers"]` if the catalog row has that fact, else the annotation's answer. Answers that
only a language model can judge are in `caption_scores`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from molmo2.eval.metrics.choices import multiple_choice
from molmo2.eval.metrics.scores import Score, exact_match
from shards.schema import Annotation, Choice, Text

AGREEING: Final = 3  # an answer that this many people gave has score 1
ANLS_THRESHOLD: Final = 0.5  # an answer at this normalised edit distance or more has score 0
TOLERANCE: Final = 0.05  # relative error up to which a number is right in relaxed accuracy

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've 'ow's'at couldn't've
hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
""".split()


def _spellings() -> dict[str, str]:
    """Misspelled contractions, without one apostrophe -> contractions, as in the table of the VQA evaluation."""
    spellings = {"somebody'd": "somebodyd"}  # the table has this one the other way round
    for word in _CONTRACTED:
        for place in (i for i, letter in enumerate(word) if letter == "'"):
            spellings[word[:place] + word[place + 1 :]] = word
    return spellings


_CONTRACTIONS = _spellings()


def vqa_normal(text: str) -> str:
    """Normalise an answer as the VQA evaluation does: no punctuation, no articles, digits for number words.

    A punctuation mark that is next to a space anywhere in the text is deleted; otherwise it is replaced by a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        out = out.replace(sign, "" if beside_space or drop_all else " ")
    words = _LONE_PERIOD.sub("", out).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accepted(asked: Annotation, row: Mapping[str, Any]) -> list[str]:
    """The accepted answers.

    Raises:
        ValueError: the row's list of answers is empty.
    """
    if "answers" not in row:
        assert isinstance(asked, Text)
        return [asked.answer]
    value = row["answers"]
    answers = [value] if isinstance(value, str) else [a["answer"] if isinstance(a, dict) else str(a) for a in value]
    if not answers:
        raise ValueError("a question without answers cannot be scored; filter it in the catalog row")
    return answers


def _agreement(answer: str, people: Sequence[str]) -> float:
    return min(1.0, people.count(answer) / AGREEING)


def vqa_accuracy(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Mean over the people of min(1, others who gave this answer / 3), all answers normalised.

    If there is only one answer, the score is 1 for that answer and else 0.
    """
    people = [vqa_normal(answer) for answer in accepted(asked, row)]
    predicted = vqa_normal(prediction)
    if len(people) == 1:
        return Score(float(predicted == people[0]))
    scores = [_agreement(predicted, people[:i] + people[i + 1 :]) for i in range(len(people))]
    return Score(sum(scores) / len(scores))


def direct_answer(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """A-OKVQA's metric: min(1, people who gave this answer / 3), ignoring case, without leaving one out."""
    people = [answer.lower().strip() for answer in accepted(asked, row)]
    return Score(_agreement(prediction.lower().strip(), people))


def anls(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """ANLS: the best of 1 - edit distance / longer length over the answers; 0 if half of the text or more differs."""
    from rapidfuzz.distance import Levenshtein  # extra "eval"

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    far = min(Levenshtein.normalized_distance(plain(prediction), plain(answer)) for answer in accepted(asked, row))
    return Score(1 - far if far < ANLS_THRESHOLD else 0.0)


def number_of(text: str) -> float | None:
    """The number that a text is, such as "1,200", "12 %" (0.12) or "-3.5"; None for any other text."""
    plain = text.strip().rstrip(".").replace(",", "")
    try:
        return float(plain.rstrip("% ")) / 100 if plain.endswith("%") else float(plain)
    except ValueError:
        return None


def _relaxed(prediction: str, answer: str) -> bool:
    """ChartQA's rule as published: a number has no thousands separator, and "12%" is 0.12."""
    predicted, expected = _strict_number(prediction), _strict_number(answer)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= TOLERANCE
    return prediction.lower() == answer.lower()


def _strict_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """ChartQA's metric: a number must be within 5 % of the answer; any other text must be equal, ignoring case."""
    predicted = " ".join(prediction.split())
    return Score(float(any(_relaxed(predicted, answer) for answer in accepted(asked, row))))


def answer_or_choice(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """The metric of benchmarks with questions of both forms: the right option, or exactly the answer.

    Numbers are compared by value, rounded to `row["precision"]` decimals if the row has it.
    """
    if isinstance(asked, Choice):
        return multiple_choice(prediction, asked, row)
    assert isinstance(asked, Text)
    predicted, expected = number_of(prediction), number_of(asked.answer)
    if predicted is not None and expected is not None:
        if row.get("precision") is not None:
            predicted, expected = (round(number, int(row["precision"])) for number in (predicted, expected))
        return Score(float(predicted == expected))
    return exact_match(prediction, asked, row)
