"""Options and lists that a column holds as text, and images that a text names."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any

from shards.schema import RejectedError

_OPTION = re.compile(r"\s*\(?(?P<letter>[A-Z])(?:\)|[.:])\)?\s+(?P<text>.*\S)\s*")
_IMAGE = re.compile(r"<image(?: (?P<number>\d+))?>")


def listed(value: Any) -> list[Any]:
    """A list as it is, a Python list as text, the options of lines "A. ...", or one other value; null is empty.

    Raises:
        RejectedError: a text that begins like a Python list and is none.
    """
    if value is None or isinstance(value, list):
        return value or []
    text = str(value).strip()
    if text.startswith("["):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RejectedError(f"neither a list nor text: {text[:60]!r}") from None
        return list(found)
    rest, lines = option_lines(text)
    return lines if lines and not rest else [text] if text else []


def option_lines(text: str) -> tuple[str, list[str]]:
    """A text without the last lines that are options "A. ...", "(B) ...", "C: ...", in order from A, and those."""
    lines = text.rstrip().split("\n")
    for first in range(len(lines) - 1):  # a single one is no choice
        found = [_OPTION.fullmatch(line) for line in lines[first:]]
        letters = [match["letter"] for match in found if match]
        if len(letters) == len(found) and letters == [chr(ord("A") + place) for place in range(len(letters))]:
            return "\n".join(lines[:first]).rstrip(), [match["text"] for match in found if match]
    return text, []


def named_images(texts: Sequence[str]) -> list[str]:
    """Texts in which "<image 2>" is called "Image 2", and the n-th "<image>" through all of them "Image n"."""
    counted = itertools.count(1)
    return [_IMAGE.sub(lambda match: f"Image {match['number'] or next(counted)}", text) for text in texts]
