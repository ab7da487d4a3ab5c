"""Short answers: VQA accuracy, ANLS, relaxed accuracy, and the mixed form of benchmarks that also have options.

Each takes the accepted answers from `row["answers"]` where the benchmark names such a column, else the annotation's
own. Answers that only a language model can judge are `metrics_captions`' matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from molmo2.eval.metrics.scores import Score, exact_match, multiple_choice
from shards.schema import Annotation, Choice, Text

AGREEING: Final = 3  # people who gave an answer that is fully right
ANLS_THRESHOLD: Final = 0.5
TOLERANCE: Final = 0.05

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'd i'm
i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't she's
should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
you'll you're you've couldn't've hadn't've he'd've i'd've it'd've mightn't've she'd've shouldn't've there'd've they'd've
who'd've wouldn't've you'd've y'all'll
""".split()


def _spellings() -> dict[str, str]:
    """A contraction without any one of its apostrophes, or without all -> the contraction."""
    found = {}
    for word in _CONTRACTED:
        found[word.replace("'", "")] = word
        for place in (i for i, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    return found


_CONTRACTIONS = _spellings()


def vqa_normal(text: str) -> str:
    """An answer as the VQA evaluation compares it: no punctuation, no articles, digits for number words.

    A sign of punctuation that stands beside a space anywhere in the text is dropped, otherwise it becomes a space.
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
    """The answers that count as right.

    Raises:
        ValueError: the row's list of answers is empty.
    """
    if "answers" not in row:
        assert isinstance(asked, Text)
        return [asked.answer]
    found = row["answers"]
    answers = [found] if isinstance(found, str) else [a["answer"] if isinstance(a, dict) else str(a) for a in found]
    if not answers:
        raise ValueError("a question without answers cannot be scored; filter it in the catalog row")
    return answers


def _agreement(answer: str, people: Sequence[str]) -> float:
    return min(1.0, people.count(answer) / AGREEING)


def vqa_accuracy(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Mean over the people of min(1, others who gave this answer / 3), all answers normalised.

    With one answer only, whether it is that answer.
    """
    people = [vqa_normal(answer) for answer in accepted(asked, row)]
    said = vqa_normal(prediction)
    if len(people) == 1:
        return Score(float(said == people[0]))
    scores = [_agreement(said, people[:i] + people[i + 1 :]) for i in range(len(people))]
    return Score(sum(scores) / len(scores))


def direct_answer(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """A-OKVQA's: min(1, people who gave this answer / 3), without leaving one out."""
    said = vqa_normal(prediction)
    return Score(_agreement(said, [vqa_normal(answer) for answer in accepted(asked, row)]))


def anls(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """Best over the answers of 1 - edit distance / longer length; 0 where half of the text or more differs."""
    from rapidfuzz.distance import Levenshtein  # extra "eval"

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    far = min(Levenshtein.normalized_distance(plain(prediction), plain(answer)) for answer in accepted(asked, row))
    return Score(1 - far if far < ANLS_THRESHOLD else 0.0)


def number_of(text: str) -> float | None:
    """A number as an answer states it: "1,200", "12 %" (0.12), "-3.5"; None for anything else."""
    plain = text.strip().rstrip(".").replace(",", "")
    try:
        return float(plain.rstrip("% ")) / 100 if plain.endswith("%") else float(plain)
    except ValueError:
        return None


def _relaxed(prediction: str, answer: str) -> bool:
    found, wanted = number_of(prediction), number_of(answer)
    if found is not None and wanted:
        return abs(found - wanted) <= TOLERANCE * abs(wanted) * (1 + 1e-12)  # the bound itself is within
    return " ".join(prediction.lower().split()).rstrip(".") == " ".join(answer.lower().split()).rstrip(".")


def relaxed_accuracy(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """ChartQA's: a number within 5 % of the answer, any other text exactly."""
    return Score(float(any(_relaxed(prediction, answer) for answer in accepted(asked, row))))


def answer_or_choice(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """For benchmarks with questions of both forms: the right option, or the answer exactly.

    Numbers are compared by value, rounded to `row["precision"]` decimals where the benchmark gives them.
    """
    if isinstance(asked, Choice):
        return multiple_choice(prediction, asked, row)
    assert isinstance(asked, Text)
    found, wanted = number_of(prediction), number_of(asked.answer)
    if found is not None and wanted is not None:
        if row.get("precision") is not None:
            found, wanted = (round(number, int(row["precision"])) for number in (found, wanted))
        return Score(float(found == wanted))
    return exact_match(prediction, asked, row)
