"""Multiple choice: which option an answer names.

The rules are tried in the order of Molmo's own metric: the option's text as it stands, its label, then a part of the
text, and last the most similar text. There are three differences. An article or pronoun ("A dog runs", "I think B") is
no label. A label may stand in a sentence, as in MMMU's metric. The most similar text counts only if it is similar: the
official metric takes it at any distance, which turns noise into a guess.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from molmo2.eval.metrics.scores import Score, plain
from shards.schema import Annotation, Choice

SIMILARITY: Final = 0.6  # smallest ratio of `difflib` at which a text counts as an option's
_MARKUP = " \t\n*_`\"'"
_AFTER_CUE = re.compile(r"\banswer\s*:", re.IGNORECASE)
_LEADING = re.compile(r"[\[(]?(?P<label>[A-Za-z]|\d\d?|[IVX]{1,5})(?:[\])]*[.:\])](?P<rest>.*))?", re.DOTALL)
# A capital letter alone, without "A dog" (but "A is right"), "I think", "U.S." and "X-ray".
_CAPITAL = (
    r"(?!A\s+(?!(?:is|because|since|as|and|or)\b)[a-z])(?!I\s+[a-z])"
    r"(?<![\w.'-])(?P<label>[A-Z])(?![\w'-]|\.\w)"
)
_NAMED = (
    re.compile(rf"(?i:\b(?:answer|option|choice)(?:\s+(?:is|was|would be|must be))?)[\s:*]*[\[(]?{_CAPITAL}"),
    re.compile(r"[\[(](?P<label>[A-Z])[\])]"),
    re.compile(_CAPITAL),
)
_ROMAN: Final = {"I": 1, "V": 5, "X": 10}


def choice_of(text: str, options: Sequence[str], labelled: bool = True) -> int | None:
    """The index of the option that an answer names by its text or label; None if it names none.

    An answer may have any form that training teaches, with letters, numbers or numerals as labels. Letters are read
    first, since evaluation shows letters; a number without text is a label only if no option has a digit. If the
    options are not `labelled`, because they are letters themselves, a letter means the option with this text.
    """
    answer = (_AFTER_CUE.split(text)[-1].strip(_MARKUP) or text.strip(_MARKUP)) if text.strip() else ""
    if not answer:
        return None
    texts = [plain(option) for option in options]
    if plain(answer) in texts:
        return texts.index(plain(answer))
    letters = {chr(ord("A") + index): index for index in range(len(texts))}
    if not labelled:
        letters = {option.upper(): index for index, option in enumerate(texts)}
    for rule in (_leading_label, _named_label, _part_of_text, _similar_text):
        index = rule(answer, texts, letters)
        if index is not None:
            return index
    return None


def _readings(label: str, letters: Mapping[str, int]) -> list[int]:
    """The indices that a label may mean: as a letter, a number, or a numeral."""
    readings = [int(label) - 1] if label.isdecimal() else [letters[label.upper()]] if label.upper() in letters else []
    if set(label) <= set(_ROMAN):
        values = [_ROMAN[sign] for sign in label]
        following = [*values[1:], 0]
        readings.append(sum(v if v >= after else -v for v, after in zip(values, following, strict=True)) - 1)
    return readings


def _leading_label(answer: str, texts: Sequence[str], letters: Mapping[str, int]) -> int | None:
    """An answer such as "B", "(b)", "B. text", "2) text", "[IV]"; the text decides between two readings of a label."""
    match = _LEADING.fullmatch(answer)
    if match is None:
        return None
    label, rest = match["label"], match["rest"] or ""
    if label.isdecimal() and rest and not rest[0].isspace():  # "3.5", "12:30"
        return None
    readings = [index for index in _readings(label, letters) if 0 <= index < len(texts)]
    with_text = [index for index in readings if rest.strip() and texts[index] == plain(rest)]
    if not with_text and answer[0] in "[(" and _NAMED[1].search(rest):  # "(C) or (A), so (A)"
        return None
    if label.isdecimal() and any(re.search(r"\d", text) for text in texts):
        readings = []
    return next(iter(with_text + readings), None)


def _named_label(answer: str, texts: Sequence[str], letters: Mapping[str, int]) -> int | None:
    """A capital letter in a sentence: after "answer" or "option", else in brackets, else alone; the last one counts."""
    for text in sorted(texts, key=len, reverse=True):
        if len(text) > 1:  # a letter within an option's text, as in "vitamin C", is no label
            answer = re.sub(rf"(?<!\w){re.escape(text)}(?!\w)", " ", answer, flags=re.IGNORECASE)
    for pattern in _NAMED:
        named = [letters[match["label"]] for match in pattern.finditer(answer) if match["label"] in letters]
        if named:
            return named[-1]
    return None


def _part_of_text(answer: str, texts: Sequence[str], letters: Mapping[str, int]) -> int | None:
    """The only option with which the answer begins, that begins with it, that has it inside, or that is inside."""
    said = plain(answer)

    def within(part: str, whole: str) -> bool:
        return bool(part) and f" {part} " in f" {re.sub(r'[.,;:!?]+(?= |$)', '', whole)} "

    def begins(part: str, whole: str) -> bool:
        return bool(part) and re.match(rf"{re.escape(part)}(?!\w)", whole) is not None

    inside = [text for text in texts if within(text, said)]
    rules = (
        [begins(text, said) for text in texts],
        [begins(said, text) for text in texts],
        [within(said, text) for text in texts],
        [text in inside and not any(within(text, other) and text != other for other in inside) for text in texts],
    )
    return next((rule.index(True) for rule in rules if sum(rule) == 1), None)


def _similar_text(answer: str, texts: Sequence[str], letters: Mapping[str, int]) -> int | None:
    nearest = difflib.get_close_matches(plain(answer), texts, n=1, cutoff=SIMILARITY)
    return texts.index(nearest[0]) if nearest else None


def multiple_choice(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """1 if the prediction names the right option."""
    assert isinstance(asked, Choice)
    return Score(float(choice_of(prediction, asked.options, asked.labelled) == asked.answer), 1 / len(asked.options))
