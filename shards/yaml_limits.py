"""Limits of a YAML file, checked before it is loaded: a few lines of aliases stand for billions of values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_NODES = 100_000  # values of a file with every alias expanded
MAX_DEPTH = 100  # levels of lists and mappings; libyaml overflows the stack at some thousands


def check_yaml(text: str) -> None:
    """Check the depth of a text and what its aliases expand to, in one pass over it.

    Raises:
        yaml.YAMLError: there are too many values or levels, an alias stands inside of what it names, or the text is no
            YAML.
    """
    sizes: dict[str, int] = {}  # anchor -> number of values below it
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor and number of values so far, outermost first
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise _error(f"more than {MAX_DEPTH} levels of lists and mappings", event)
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _error(f"the alias *{event.anchor} stands inside of what it names, or names nothing", event)
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        outer, before = open_nodes[-1]
        open_nodes[-1] = (outer, before + size)
        if before + size > MAX_NODES:
            raise _error(f"its aliases stand for more than {MAX_NODES} values", event)


def checked(path: Path) -> Path:
    """The path of a file whose content passes `check_yaml`; raises what that does, or an OSError."""
    check_yaml(path.read_text(encoding="utf-8"))
    return path


def _error(problem: str, event: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
