"""Conversations without images."""

from __future__ import annotations

from collections.abc import Iterator

from shards.convert.common import Group, Omitted, text_of
from shards.schema import Chat, Example, Turn


def chat(group: Group) -> Iterator[Example | Omitted]:
    """One conversation; what a system turn says goes in front of the first user turn, for there is no such turn."""
    messages = [(str(m["role"]), text_of(m["content"])) for m in group.items("messages")]
    system = ""
    if messages and messages[0][0] == "system":
        system = f"System: {messages[0][1]}\n"
        messages = messages[1:]
    if len(messages) < 2:
        yield group.omit(f"a conversation of {len(messages)} messages")
        return
    turns = [Turn(role=role, text=text) for role, text in messages]
    turns[0] = Turn(role=turns[0].role, text=system + turns[0].text)
    yield group.example([Chat(style=str(group.option("style")), turns=tuple(turns))])
