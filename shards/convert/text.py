"""Conversations without images."""

from __future__ import annotations

from collections.abc import Iterator

from shards.convert.common import Group, text_of
from shards.schema import Chat, Example, FilteredError, Turn


def chat(group: Group) -> Iterator[Example]:
    """One conversation; what the publisher flagged and what options exclude is filtered."""
    if group.get("category") in group.option("drop_categories"):
        raise FilteredError(f"category {group.get('category')}")
    if group.get("empty") or group.get("special"):
        raise FilteredError("flagged: an empty message or a special token")
    if (tokens := group.get("first_tokens")) is not None and tokens > group.option("max_first_tokens"):
        raise FilteredError(f"first message of {tokens} tokens, at most {group.option('max_first_tokens')}")
    turns = tuple(Turn(role=str(m["role"]), text=text_of(m["content"])) for m in group.get("messages") or ())
    yield group.example([Chat(style=str(group.option("style")), turns=turns)])
