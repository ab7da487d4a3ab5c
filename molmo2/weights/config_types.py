"""Values of wrong types in another model's `config.json`: one error that names the file, wherever the value is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

CONFIG = "config.json"
T = TypeVar("T")


class ForeignConfigError(ValueError):
    """A `config.json` cannot be read, or describes a model that this code does not support."""


def checks_types(read: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function that reads the configuration of a model's directory: it raises nothing but `ForeignConfigError`.

    The sizes and constants in what it returns are checked as well.
    """

    @functools.wraps(read)
    def checked(directory: Path, *rest: Any) -> T:
        where = f"{directory / CONFIG}, or a processor's file beside it"
        try:
            config = read(directory, *rest)
        except ForeignConfigError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ForeignConfigError(f"{where}: a value of a wrong type: {type(error).__name__}: {error}") from error
        if problems := list(_wrong_numbers(config)):
            raise ForeignConfigError(f"{where}: {'; '.join(problems)}")
        return config

    return checked


def _wrong_numbers(config: Any) -> Iterator[str]:
    """The fields that are no positive integers or no numbers, though they must be; tuples are looked into."""
    for part in config if isinstance(config, tuple) else (config,):
        if not dataclasses.is_dataclass(part):
            continue
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and (type(value) is not int or value < 0):
                yield f"{field.name} is {value!r}, which is no size"
            elif field.type == "float" and type(value) not in (int, float):
                yield f"{field.name} is {value!r}, which is no number"
            else:
                yield from _wrong_numbers(value)
