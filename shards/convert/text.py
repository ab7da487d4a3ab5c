"""Conversations without images."""

from __future__ import annotations

from collections.abc import Iterator

from shards.convert.common import Group, Omitted, text_of
from shards.schema import Chat, Example, Turn


def chat(group: Group) -> Iterator[Example | Omitted]:
    """One conversation; what the publisher flagged and what options exclude is left out."""
    tokens, most = group.get("first_tokens"), group.option("max_first_tokens")
    if group.get("category") in group.option("drop_categories"):
        yield group.omit(f"category {group.get('category')}")
    elif group.get("empty") or group.get("special"):
        yield group.omit("flagged: an empty message or a special token")
    elif tokens is not None and tokens > most:
        yield group.omit(f"first message longer than {most} tokens: {tokens}")
    else:
        turns = tuple(Turn(role=str(m["role"]), text=text_of(m["content"])) for m in group.get("messages") or ())
        yield group.example([Chat(style=str(group.option("style")), turns=turns)])
