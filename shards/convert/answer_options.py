"""Parsing of answer options and lists in text columns, and renaming of image placeholders in texts."""

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


def place_of(how: str, answer: Any, options: Sequence[str], first: int = 0) -> int | None:
    """Index of the right option; None if the answer names no option.

    `how`: "index" (counted from `first`), "text" (equal to the option), or "letter" ("B", "(B)", "Caption B: ...").
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
    """Replace "<image 2>" by "Image 2", and the n-th "<image>" of all texts by "Image n", counted from `first`."""
    counted = itertools.count(first)
    return [_IMAGE.sub(lambda match: f"Image {match['number'] or next(counted)}", text) for text in texts]
