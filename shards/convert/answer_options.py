"""Options and lists that a column holds as text, and images that a text names."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any

from shards.schema import RejectedError

_LABEL = r"\(?(?:[A-Z][a-z]+ )?(?P<mark>[A-Z]|[1-9])"  # A, (A, Caption A, Option 1
_OPTION = re.compile(rf"\s*{_LABEL}[.:)]\s+(?P<text>.*\S)\s*")
_ANSWER = re.compile(rf"{_LABEL}(?:[.:)].*)?", re.DOTALL)
_IMAGE = re.compile(r"<image(?: (?P<number>\d+))?>")


def listed(value: Any) -> list[Any]:
    """A list, a Python list as text, the options of lines "A. ...", or one other value; null is empty.

    Options lose their labels where all of them have theirs.

    Raises:
        RejectedError: a text that begins like a Python list and is none.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return _unlabelled(value) or value
    text = str(value).strip()
    if text.startswith("["):
        try:
            found = list(ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RejectedError(f"neither a list nor text: {text[:60]!r}") from None
        return _unlabelled(found) or found
    return _unlabelled(text.split("\n")) or ([text] if text else [])


def option_lines(text: str) -> tuple[str, list[str]]:
    """A text without the last lines that are options "A. ...", "(B) ...", "C: ...", in that order, and the options."""
    lines = text.rstrip().split("\n")
    for first in range(len(lines)):
        if found := _unlabelled(lines[first:]):
            return "\n".join(lines[:first]).rstrip(), found
    return text, []


def _unlabelled(options: Sequence[Any]) -> list[str]:
    """Options without their labels; none where one has no label or another one's, or where there is no choice."""
    found = [_OPTION.fullmatch(option) if isinstance(option, str) else None for option in options]
    marks = "".join(match["mark"] for match in found if match)
    if len(options) < 2 or len(marks) < len(options) or not marks.startswith(("A", "1")):
        return []
    if marks != "".join(chr(ord(marks[0]) + place) for place in range(len(marks))):
        return []
    return [match["text"] for match in found if match]


def place_of(how: str, answer: Any, options: Sequence[str], first: int = 0) -> int | None:
    """Index of the right option, None where the answer names none.

    `how`: "index", counted from `first`; "text", that of the option; "letter", its label: "B", "(B)", "Caption B: ...".
    """
    text = "" if answer is None else str(answer).strip()
    if how == "text":
        return options.index(text) if text in options else None
    if how == "letter":
        label = _ANSWER.fullmatch(text)
        number = ord(label["mark"]) - ord("A" if label["mark"].isalpha() else "1") if label else -1
    else:
        number = int(float(text)) - first if re.fullmatch(r"\d+(\.0)?", text) else -1
    return number if 0 <= number < len(options) else None


def named_images(texts: Sequence[str], first: int = 1) -> list[str]:
    """Texts in which "<image 2>" is called "Image 2", and "<image>" through all of them "Image n", from `first` on."""
    counted = itertools.count(first)
    return [_IMAGE.sub(lambda match: f"Image {match['number'] or next(counted)}", text) for text in texts]
