"""What the layouts of a user's data are made of: their columns by name and value, the splits of files, and answers.

`shards.convert.recognise` recognises the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.sources.media_files import VIDEO_SUFFIXES

Rows = Sequence[Mapping[str, Any]]
Answers = Mapping[str, str]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# what a column holds -> its names in published data, the likeliest first
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "image": ("image", "images", "image_path", "image_file", "img", "img_path", "picture", "photo", "image_url"),
    "video": ("video", "videos", "video_path", "video_file", "clip"),
    "path": ("file_name", "filename", "file", "path", "filepath", "url", "id"),
    "question": ("question", "query", "prompt", "instruction", "problem"),
    "answer": ("answer", "answers", "response", "output", "solution", "multiple_choice_answer"),
    "options": ("options", "choices", "candidates"),
    "points": ("points", "point", "coordinates"),
    "caption": ("caption", "captions", "text", "description", "sentence", "prompt"),
    "label": ("label", "class", "category", "class_name", "label_name"),
    "start": ("start", "start_time", "begin"),
    "end": ("end", "end_time", "stop"),
}
_SPLIT = re.compile(
    r"(?:^|(?<=[-_./]))(train|training|val|valid|validation|dev|test)(?:\d*)(?=[-_./]|$)", re.IGNORECASE
)
_PART = re.compile(r"-\d{5}-of-\d{5}")


class UnsureError(ValueError):
    """The data do not show something that must be known: its name, a question to the user, and the possible answers."""

    def __init__(self, name: str, question: str, choices: Sequence[str]) -> None:
        super().__init__(f"{question} ({', '.join(choices)}); answer with --choose {name}={choices[0]}")
        self.name, self.question, self.choices = name, question, tuple(choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A recognised layout.

    Attributes:
        name: the layout in words.
        keys: keys of the catalog row: converter, columns, options and others that depend on the layout.
        media: "image", "video" or "text": what the examples show.
        media_column: column with the path, URL or bytes of an image or a video; None: in the messages, or none.
        rows: the rows of a table that must be written first, because the data have none for this purpose.
        classes: the rows of a table that each row of the data is joined with, by the number of its class.
    """

    name: str
    keys: dict[str, Any]
    media: str = "image"
    media_column: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    classes: list[dict[str, Any]] = field(default_factory=list)


def split_and_stem(path: str) -> tuple[str, str]:
    """The split that the name of a table or folder says, "train" or "validation", and the name without it.

    Example:
        "data/val-00000-of-00002.parquet" -> ("validation", "data/.parquet")
    """
    name = _PART.sub("", path)
    found = _SPLIT.search(name)
    held_out = found is not None and not found[1].lower().startswith("train")
    stem = name if found is None else name[: found.start()] + name[found.end() :]
    return "validation" if held_out else "train", stem


def values_of(rows: Rows, column: str) -> list[Any]:
    """The values of a column that are not missing; the items of lists in place of lists."""
    values = [row.get(column) for row in rows]
    return [item for value in values for item in (value if isinstance(value, list) else [value]) if item is not None]


def is_media(value: Any, suffixes: Sequence[str]) -> bool:
    """Whether a value is an image or a video by its suffix, or embedded bytes, or a URL of data."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or is_media(value.get("path") or value.get("url"), suffixes)
    if isinstance(value, bytes):
        return suffixes is IMAGE_SUFFIXES
    text = str(value).partition("?")[0].lower()
    return text.endswith(tuple(suffixes)) or (suffixes is IMAGE_SUFFIXES and text.startswith("data:image/"))


def find_column(rows: Rows, kind: str) -> str | None:
    """The column with the likeliest of the names of a kind."""
    present = {name.lower(): name for row in rows for name in row}
    return next((present[name] for name in NAMES[kind] if name in present), None)


def media_column(rows: Rows, kind: str) -> str | None:
    """The column with images or videos: by its name and its values."""
    suffixes = IMAGE_SUFFIXES if kind == "image" else VIDEO_SUFFIXES
    present = {name.lower(): name for row in rows for name in row}
    for name in (*NAMES[kind], *NAMES["path"]):
        values = values_of(rows, present[name]) if name in present else []
        if values and all(is_media(value, suffixes) for value in values):
            return present[name]
    return None


def chosen(name: str, question: str, choices: Sequence[str], answers: Answers) -> str:
    """The answer to a question.

    Raises:
        UnsureError: there is none yet, or it is none of the choices.
    """
    if answers.get(name) not in choices:
        raise UnsureError(name, question, choices)
    return answers[name]
