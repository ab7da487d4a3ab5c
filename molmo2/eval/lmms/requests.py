"""Convert requests of lmms-eval: chat messages to an `Example`, and generation arguments to `Generation`.

Media come before all text, as in training. With several images, names ("Image 2") replace the images within the text. A
system message becomes the start of the first question, since our chats have no system turns. Supported media are images
and one video, as files or in memory. Only `molmo2.eval.lmms.plugin` imports lmms-eval.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from molmo2.model.generate import Sampling
from shards.media.images import rgb_pixels
from shards.schema import Chat, Example, ImageRef, RejectedError, Source, Turn, VideoRef

MAX_NEW_TOKENS = 1024  # maximum length of an answer for tasks that do not set it
READ = frozenset({"max_new_tokens", "until", "do_sample", "temperature", "top_p", "top_k", "seed"})  # arguments used
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, "", [])  # values with which other arguments have no effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The generation arguments of a task.

    Attributes:
        until: stop texts; an answer ends before the first of them.
        ignored: unsupported arguments, with their values.
    """

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]
    ignored: dict[str, Any] = field(default_factory=dict)


def generation_of(arguments: Mapping[str, Any], seed: int = 0) -> Generation:
    """Convert a task's `generation_kwargs`.

    Generation is greedy with `do_sample: false`, with `top_k: 1`, or without a temperature above 0.

    Args:
        arguments: as in the task's YAML file.
        seed: added to the task's seed, so that batches differ.

    Raises:
        ValueError: a value is out of its range.
    """
    until = arguments.get("until") or ()
    max_new_tokens = int(arguments.get("max_new_tokens") or MAX_NEW_TOKENS)
    if max_new_tokens < 1:
        raise ValueError(f"generation_kwargs: max_new_tokens is {max_new_tokens}; at least 1")
    temperature = arguments.get("temperature")
    if temperature is None:
        temperature = 1.0 if arguments.get("do_sample") else 0.0
    if arguments.get("do_sample") is False or arguments.get("top_k") == 1:
        temperature = 0.0
    top_p = float(arguments.get("top_p") or 1.0)  # tasks write 0 for an unset top_p
    sampling = Sampling(temperature=float(temperature), top_p=top_p, seed=seed + int(arguments.get("seed") or 0))
    ignored = {name: value for name, value in arguments.items() if name not in READ and value not in NEUTRAL}
    if sampling.temperature and (arguments.get("top_k") or 0) > 1:
        ignored["top_k"] = arguments["top_k"]
    return Generation(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        ignored=ignored,
    )


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first occurrence of any text in `until`."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]


def example_of(messages: Sequence[Mapping[str, Any]]) -> Example:
    """Convert chat messages, each a `role` and a `content`: a text, or parts such as {"type": "image", "url": ...}.

    Raises:
        RejectedError: an unsupported kind or combination of media, or turns that do not end with a question.
    """
    parts = [part for message in messages for part in _parts(message["content"])]
    images = [_image(part["url"]) for part in parts if part["type"] == "image"]
    videos = [_video(part) for part in parts if part["type"] == "video"]
    if others := {part["type"] for part in parts} - {"text", "image", "video"}:
        raise RejectedError(f"content of type {', '.join(sorted(others))}: only text, images and a video can be shown")
    if len(videos) + bool(images) > 1:
        raise RejectedError(f"{len(videos)} videos and {len(images)} images: only images or one video can be shown")
    return Example(
        key="lmms-eval",
        dataset="lmms-eval",
        source=Source(file="", row=0),
        annotations=(Chat(style="user_qa", turns=_turns(messages, named=len(images) > 1)),),
        images=tuple(images),
        video=videos[0] if videos else None,
    )


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _turns(messages: Sequence[Mapping[str, Any]], *, named: bool) -> tuple[Turn, ...]:
    """Alternating turns that end with the user; if `named`, images after some text are replaced by their names."""
    turns: list[tuple[str, str]] = []
    number = 0
    for message in messages:
        role = "user" if message["role"] == "system" else str(message["role"])
        text = ""
        for part in _parts(message["content"]):
            if part["type"] == "image":
                number += 1
                text = _join(text, f"Image {number}" if named and (turns or text) else "", " ")
            elif part["type"] == "text":
                text = _join(text, part["text"].strip(), " ")
        if message["role"] == "system" and text:
            text = f"System: {text}"
        before = turns.pop()[1] if turns and turns[-1][0] == role else ""
        turns.append((role, _join(before, text, "\n")))
    roles = [role for role, _ in turns]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise RejectedError(f"roles {roles}: user and assistant must take turns, the user first and last")
    return tuple(Turn(role=role, text=text) for role, text in turns)


def _join(before: str, after: str, separator: str) -> str:
    """Join two texts, with the separator unless one is empty."""
    return separator.join(filter(None, [before, after]))


def _image(image: Any) -> ImageRef:
    if isinstance(image, str):
        if "://" in image:
            raise RejectedError(f"{image}: images are read from files; download it first")
        return ImageRef(path=image)
    if not isinstance(image, PIL.Image.Image):
        raise RejectedError(f"an image given as {type(image).__name__}: a path or a PIL image is needed")
    data = io.BytesIO()
    PIL.Image.fromarray(rgb_pixels(image)).save(data, "PPM")  # as `load_image` treats a file
    return ImageRef(data=data.getvalue())


def _video(part: Mapping[str, Any]) -> VideoRef:
    """A video given by a path or by a mapping with a path; the times of a clip are in the mapping or in the part."""
    value = part["url"]
    inner = value if isinstance(value, Mapping) else {}
    path = (inner.get("url") or inner.get("path")) if inner else value
    if not isinstance(path, str) or "://" in path:
        raise RejectedError(f"a video given as {path!r:.80}: the path of a file is needed")
    start, end = (inner.get(f"video_{side}", part.get(f"{side}_time")) for side in ("start", "end"))
    return VideoRef(path=path, start=None if start is None else float(start), end=None if end is None else float(end))
