"""Questions with answer options: parsing of options and lists in text columns, and names of images in texts."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shards.convert.common import text_of
from shards.schema import Choice, RejectedError, Text

_LABEL = r"\(?(?:[A-Z][a-z]+ )?(?P<mark>[A-Z]|[1-9])"  # A, (A, Caption A, Option 1
_OPTION = re.compile(rf"\s*{_LABEL}[.:)]\s+(?P<text>.*\S)\s*")
_ANSWER = re.compile(rf"{_LABEL}(?:[.:)].*)?", re.DOTALL)
_IMAGE = re.compile(r"<image(?: (?P<number>\d+))?>")


class ParsedQuestion(NamedTuple):
    """A question and its answer; for multiple choice, the options and the index of the right one."""

    question: str
    answer: str
    options: tuple[str, ...] = ()
    right: int | None = None

    def shuffled(self, rng: np.random.Generator) -> ParsedQuestion:
        """The question with its options in a drawn order."""
        assert self.right is not None
        order = [int(number) for number in rng.permutation(len(self.options))]
        return self._replace(options=tuple(self.options[number] for number in order), right=order.index(self.right))

    def as_choice(self, style: str) -> Choice:
        """The question as multiple choice."""
        assert self.right is not None
        return Choice(style=style, question=self.question, options=self.options, answer=self.right)

    def as_text(self, style: str) -> Text:
        """The question as an open one."""
        return Text(style=style, question=self.question, answer=self.answer)


def split_question(question: str, given: Any, cut: str | None, embedded: bool) -> tuple[str, list[str]]:
    """The final text of a question and its options.

    Args:
        question: the text in the row.
        given: the options in the row, in one of the forms of `listed`.
        cut: regular expression; its matches are removed from the question.
        embedded: the last lines of the question are the options; they count if the row gives no others.
    """
    lines: list[str] = []
    if cut:
        question = re.sub(cut, "", question).strip()
    if embedded:
        question, lines = option_lines(question)
    return question, [text_of(option) for option in listed(given)] or lines


def listed(value: Any) -> list[Any]:
    """Parse a list: a list, a Python list as text, lines "A. ...", or a single value; null is an empty list.

    Labels such as "A. " are removed if all options have theirs.

    Raises:
        RejectedError: a text begins like a Python list, but cannot be parsed.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return _unlabelled(value) or value
    text = str(value).strip()
    if text.startswith("["):
        try:
            values = list(ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RejectedError(f"neither a list nor text: {text[:60]!r}") from None
        return _unlabelled(values) or values
    return _unlabelled(text.split("\n")) or ([text] if text else [])


def option_lines(text: str) -> tuple[str, list[str]]:
    """Split off the last lines of a text that are options "A. ...", "(B) ...", "C: ...": the rest, and the options."""
    lines = text.rstrip().split("\n")
    for first in range(len(lines)):
        if options := _unlabelled(lines[first:]):
            return "\n".join(lines[:first]).rstrip(), options
    return text, []


def _unlabelled(options: Sequence[Any]) -> list[str]:
    """Options without their labels; [] if a label is missing or out of order, or there are fewer than 2 options."""
    matches = [_OPTION.fullmatch(option) if isinstance(option, str) else None for option in options]
    marks = "".join(match["mark"] for match in matches if match)
    if len(options) < 2 or len(marks) < len(options) or not marks.startswith(("A", "1")):
        return []
    if marks != "".join(chr(ord(marks[0]) + place) for place in range(len(marks))):
        return []
    return [match["text"] for match in matches if match]


def right_option(how: str, answer: Any, options: Sequence[str], first: int = 0) -> int:
    """Index of the right option.

    `how`: "index" (counted from `first`), "text" (equal to the option), "letter" ("B", "(B)", "Caption B: ..."), or
    "marks" (the answer is a list with a mark for each option, where "correct" is the right one).

    Raises:
        RejectedError: the answer names no option, or several.
    """
    if how == "marks":
        marked = [number for number, mark in enumerate(answer or ()) if mark == "correct"]
        if len(marked) != 1:
            raise RejectedError(f"{len(marked)} right options, wanted one")
        return marked[0]
    text = text_of(answer)
    if how == "text":
        number = options.index(text) if text in options else -1
    elif how == "letter":
        label = _ANSWER.fullmatch(text)
        number = ord(label["mark"]) - ord("A" if label["mark"].isalpha() else "1") if label else -1
    else:
        number = int(float(text)) - first if re.fullmatch(r"\d+(\.0)?", text) else -1
    if not 0 <= number < len(options):
        raise RejectedError(f"the answer {text!r} is none of {len(options)} options")
    return number


def named_images(texts: Sequence[str], first: int = 1) -> list[str]:
    """Replace "<image 2>" by "Image 2", and the n-th "<image>" of all texts by "Image n", counted from `first`."""
    counted = itertools.count(first)
    return [_IMAGE.sub(lambda match: f"Image {match['number'] or next(counted)}", text) for text in texts]
