"""Converter of conversations, given as lists of messages: text only, about images, or about one video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shards.catalog.converters import ChatOptions
from shards.convert.common import Group, Omitted, text_of
from shards.convert.marks import texts_without_marks
from shards.schema import Chat, Example, RejectedError, Turn

ROLES: Final = {"human": "user", "gpt": "assistant"}  # the names of roles in ShareGPT and LLaVA data
_PART_KEYS: Final = ("text", "image", "image_url", "video", "video_url")  # a part without a type has one of them

Part = tuple[str, Any]  # kind ("text", "image" or "video") and value


def chat(group: Group, options: ChatOptions) -> Iterator[Example | Omitted]:
    """Convert one conversation; a system message is put before the first user message, as a chat has no system turn.

    Messages are {role, content} or {from, value}; content is a text or a list of parts, {"type": "image", "image": ...}
    for instance, whose texts are joined with a space. Media are such parts, or the fields `image` (one or a list) and
    `video`, of which `start` and `end` may name a clip. All media come before the text; if there are several images, a
    placeholder "<image>" or an image part later in the text becomes the name of the image ("Image 2").
    `molmo2/processing/chat_template.jinja` renders messages in the same way.
    """
    messages = [_message(message) for message in group.items("messages")]
    parts = [part for _, content in messages for part in content]
    images = [*_as_list(group.get("image")), *(value for kind, value in parts if kind == "image")]
    videos = [*_as_list(group.get("video")), *(value for kind, value in parts if kind == "video")]
    if len(videos) + bool(images) > 1:
        raise RejectedError(f"{len(images)} images and {len(videos)} videos; a conversation has images or one video")
    texts = [_text(content, len(images)) for _, content in messages]
    texts = texts_without_marks(texts, len(images), bool(videos))
    spoken = list(zip([role for role, _ in messages], texts, strict=True))
    system = ""
    if spoken and spoken[0][0] == "system":
        system = f"System: {spoken[0][1]}\n" if spoken[0][1] else ""
        spoken = spoken[1:]
    if len(spoken) < 2:
        yield group.omit(f"a conversation of {len(spoken)} messages")
        return
    turns = [Turn(role=role, text=text) for role, text in spoken]
    turns[0] = Turn(role=turns[0].role, text=system + turns[0].text)
    row, clip = group.values[0], (group.get("start"), group.get("end"))
    yield group.example(
        [Chat(style=options.style, turns=tuple(turns))],
        images=[group.media.image(value, None, row) for value in images],
        video=group.media.video(videos[0], *clip, row) if videos else None,
    )


def _message(message: Mapping[str, Any]) -> tuple[str, list[Part]]:
    role, content = (message.get(new) or message.get(old) for new, old in (("role", "from"), ("content", "value")))
    role = str(role).lower()
    parts = content if isinstance(content, list) else [text_of(content)]
    return ROLES.get(role, role), [_part(part) for part in parts]


def _part(part: Mapping[str, Any] | str) -> Part:
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") or next((name for name in _PART_KEYS if part.get(name) is not None), None)
    kind = str(kind).removesuffix("_url")
    value = next((item for name in (kind, f"{kind}_url", "url", "path") if (item := part.get(name))), None)
    value = value.get("url") if isinstance(value, Mapping) and "url" in value else value
    if kind == "text":
        return kind, value or ""
    if kind not in {"image", "video"} or value is None:
        raise RejectedError(f"a part of a message must be text, an image or a video: {str(part)[:80]}")
    return kind, value


def _as_list(value: Any) -> Sequence[Any]:
    if isinstance(value, list):
        return value if any(item is not None for item in value) else []
    return [value] if value else []


def _text(content: Sequence[Part], num_images: int) -> str:
    """The text of a message; if there are several images, it has a mark for each of its image parts."""
    marks = {"image": "<image>" if num_images > 1 else "", "video": ""}
    return " ".join(filter(None, [text_of(value) if kind == "text" else marks[kind] for kind, value in content]))
