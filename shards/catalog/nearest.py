"""The known name that is nearest to a wrong one, for error messages."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest known name; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to a wrong one, if there is any, and all known names."""
    names = list(known)
    return f"{did_you_mean(name, names)}known: {', '.join(names) or 'none'}"


def known_keys(model: type[pydantic.BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that a model has at the location of a pydantic error; indices and keys of mappings are skipped."""
    annotation: Any = model
    for part in location:
        keys = {name: field for found in _models(annotation) for name, field in found.model_fields.items()}
        annotation = keys[str(part)].annotation if part in keys else annotation
    return sorted({name for found in _models(annotation) for name in found.model_fields})


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The pydantic models inside a type such as `dict[str, Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]
