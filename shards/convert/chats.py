"""Conversations as lists of messages: of text alone, about images, or about one video."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shards.convert.answer_options import named_images
from shards.convert.common import Group, Omitted, text_of
from shards.schema import Chat, Example, RejectedError, Turn

ROLES: Final = {"human": "user", "gpt": "assistant"}  # as ShareGPT and LLaVA call them
_LEADING = re.compile(r"(?:\s*<image>)+\s*")

Part = tuple[str, Any]  # "text", "image" or "video", and what it is


def chat(group: Group) -> Iterator[Example | Omitted]:
    """One conversation; what a system turn says goes in front of the first user turn, for there is no such turn.

    Messages are {role, content} or {from, value}; content is a text or a list of parts, {"type": "image", "image": ...}
    for instance. Media are such parts, or the fields `image` (one or a list) and `video`, of which `start` and `end`
    may name a clip. They stand before all text: an "<image>" or a part further on becomes the name of the image where
    there are several ("Image 2").
    """
    messages = [_message(one) for one in group.items("messages")]
    parts = [part for _, content in messages for part in content]
    images = [*_each(group.get("image")), *(value for kind, value in parts if kind == "image")]
    videos = [*_each(group.get("video")), *(value for kind, value in parts if kind == "video")]
    if len(videos) + bool(images) > 1:
        raise RejectedError(f"{len(images)} images and {len(videos)} videos; a conversation has images or one video")
    texts = [_text(content) for _, content in messages]
    if videos:
        texts = [text.replace("<video>", "").strip() for text in texts]
    elif images:
        texts = _without_marks(texts, len(images))
    said = list(zip([role for role, _ in messages], texts, strict=True))
    system = ""
    if said and said[0][0] == "system":
        system = f"System: {said[0][1]}\n"
        said = said[1:]
    if len(said) < 2:
        yield group.omit(f"a conversation of {len(said)} messages")
        return
    turns = [Turn(role=role, text=text) for role, text in said]
    turns[0] = Turn(role=turns[0].role, text=system + turns[0].text)
    row, clip = group.values[0], (group.get("start"), group.get("end"))
    yield group.example(
        [Chat(style=str(group.option("style")), turns=tuple(turns))],
        images=[group.media.image(value, None, row) for value in images],
        video=group.media.video(videos[0], *clip, row) if videos else None,
    )


def _message(message: Mapping[str, Any]) -> tuple[str, list[Part]]:
    role, content = (message.get(new) or message.get(old) for new, old in (("role", "from"), ("content", "value")))
    if not isinstance(content, list):
        return ROLES.get(str(role), str(role)), [("text", text_of(content))]
    return ROLES.get(str(role), str(role)), [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Part:
    kind = str(part.get("type")).removesuffix("_url")
    value = next((found for name in (kind, f"{kind}_url", "url", "path") if (found := part.get(name))), None)
    value = value.get("url") if isinstance(value, Mapping) and "url" in value else value
    if kind not in {"text", "image", "video"} or value is None:
        raise RejectedError(f"a part of a message must be text, an image or a video: {str(part)[:80]}")
    return kind, value


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _text(content: Sequence[Part]) -> str:
    return "\n".join(text_of(value) if kind == "text" else f"<{kind}>" for kind, value in content)


def _without_marks(texts: Sequence[str], num_images: int) -> list[str]:
    """Texts without "<image>"; of several images those after some text are named.

    Raises:
        RejectedError: there are other numbers of images and of marks.
    """
    marks = sum(text.count("<image>") for text in texts)
    if marks not in {0, num_images}:
        raise RejectedError(f'"<image>" stands {marks} times in a conversation about {num_images} images')
    if num_images == 1:
        return [text.replace("<image>", "").strip() for text in texts]
    first = next((number for number, text in enumerate(texts) if "<image>" in text), 0)
    leading = _LEADING.match(texts[first]) if texts else None
    texts = [text[leading.end() :] if leading and number == first else text for number, text in enumerate(texts)]
    return named_images(texts, 1 + (leading[0].count("<image>") if leading else 0))
