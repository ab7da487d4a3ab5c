"""Shared code of the converters: the group of rows, access to their columns, seeded random draws."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from shards.catalog import Row, Stage
from shards.catalog.converters import CONVERTER_OPTIONS
from shards.schema import Annotation, Cue, Example, ImageRef, Points, RejectedError, Source, VideoRef, as_reject
from shards.sources.media_files import MediaFiles
from shards.sources.paths import at

Kind = TypeVar("Kind", bound=Annotation)

OUTSIDE = 0.01  # fraction of a side; a point at most this far outside counts as on the edge
MAX_WHOLE = 2**53  # floats below this hold every whole number

# name of a coordinate system -> its width and height, by which coordinates are divided
SCALES = {"percent": (100.0, 100.0), "unit": (1.0, 1.0), "thousand": (1000.0, 1000.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Omitted:
    """A row or an annotation that is left out, and recorded.

    `fault`: the row cannot be used, which counts as a reject; otherwise the catalog leaves it out on purpose.
    """

    source: Source
    reason: str
    fault: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rows of one image or video (or a single row), their sources, and the catalog row of the dataset.

    `num_variants` is the number of text variants of a sample: what is drawn is drawn for each of them.
    """

    row: Row
    stage: Stage
    media: MediaFiles
    key: str
    sources: tuple[Source, ...]
    values: tuple[dict[str, Any], ...]
    num_variants: int = 1

    def get(self, field: str, index: int = 0) -> Any:
        """The value of a field in row `index` of the group; None if the catalog row maps no column to the field.

        Raises:
            KeyError: the converter does not declare the field in `shards.catalog.converters`.
        """
        column = self.row.columns[field] if self.maps(field) else None
        return None if column is None else at(self.values[index], column)

    def maps(self, field: str) -> bool:
        """Whether the catalog row maps a column to the field.

        Raises:
            KeyError: the converter does not declare the field in `shards.catalog.converters`.
        """
        if not CONVERTER_OPTIONS[self.row.converter].reads(field):
            raise KeyError(
                f"converter {self.row.converter} reads the field {field!r}, which its options do not declare"
            )
        return field in self.row.columns

    def numbered(self, field: str) -> list[str]:
        """The mapped fields FIELD_0, FIELD_1 and so on, ordered by their numbers."""
        self.maps(f"{field}_#")  # raises if it is not declared
        named = [name for name in self.row.columns if re.fullmatch(rf"{field}_\d+", name)]
        return sorted(named, key=lambda name: int(name.rpartition("_")[2]))

    def items(self, field: str, index: int = 0) -> list[Any]:
        """The value of a list field in row `index`; null becomes an empty list.

        Raises:
            RejectedError: the value is not a list.
        """
        value = self.get(field, index)
        if value is not None and not isinstance(value, list):
            raise RejectedError(self._mistyped(field, "a list", value))
        return value or []

    def text(self, field: str, index: int = 0) -> str:
        """The value of a text field (a string or a number) in row `index`, stripped; null becomes "".

        Raises:
            RejectedError: the value is a list, an object or bytes.
        """
        value = self.get(field, index)
        if isinstance(value, list | dict | bytes):
            raise RejectedError(self._mistyped(field, "text", value))
        return text_of(value)

    def _mistyped(self, field: str, expected: str, value: Any) -> str:
        return (
            f"column {self.row.columns[field]}: expected {expected}, found {type(value).__name__} {str(value)[:60]!r}"
        )

    def aligned(self, index: int, *fields: str) -> Iterator[tuple[Any, ...]]:
        """Yield the values of fields item by item; if the first field is no list, the row `index` is a single item.

        Raises:
            RejectedError: another field is not a list of the same length.
        """
        values = [self.get(field, index) for field in fields]
        if not isinstance(values[0], list):
            yield tuple(values)
            return
        length = len(values[0])
        columns = [[None] * length if value is None else value for value in values]
        for field, column in zip(fields, columns, strict=True):
            if not isinstance(column, list) or len(column) != length:
                actual = f"{len(column)}" if isinstance(column, list) else type(column).__name__
                raise RejectedError(f"column {self.row.columns[field]}: expected a list of {length}, found {actual}")
        yield from zip(*columns, strict=True)

    def image(self, field: str = "image", index: int = 0, sha256: str = "sha256") -> ImageRef:
        """The image of row `index`; its hash is checked if the catalog row maps `sha256` to a column."""
        return self.media.image(self.get(field, index), self.get(sha256, index), self.values[index])

    def generators(self, draw: str) -> list[np.random.Generator]:
        """A generator for each text variant, seeded by the group, the name `draw` of the draw and the variant.

        In stage "eval" all variants are equal, so there is only one.
        """
        seed = f"{self.row.name}/{self.key}/{draw}"
        return [rng_of(seed, f"variant {n}") for n in range(1 if self.stage == "eval" else self.num_variants)]

    def omit(self, reason: str, index: int = 0) -> Omitted:
        """Record that row `index`, or a part of it, is left out for `reason`."""
        return Omitted(source=self.sources[index], reason=reason)

    def reject(self, reason: str, index: int = 0) -> Omitted:
        """Record that row `index` cannot be used for `reason`."""
        return Omitted(source=self.sources[index], reason=reason, fault=True)

    def part(self, indices: Sequence[int]) -> Group:
        """The group with only these of its rows."""
        sources = tuple(self.sources[index] for index in indices)
        return replace(self, sources=sources, values=tuple(self.values[index] for index in indices))

    def example(
        self,
        annotations: Sequence[Annotation],
        *,
        images: Sequence[ImageRef] = (),
        video: VideoRef | None = None,
        subtitles: Sequence[Cue] | None = None,
        suffix: str = "",
        loss_scale: float = 1.0,
    ) -> Example:
        """Make an example of this group; `suffix` makes the keys of several examples distinct."""
        return Example(
            key=self.key + suffix,
            dataset=self.row.name,
            source=self.sources[0],
            annotations=tuple(annotations),
            images=tuple(images),
            video=video,
            subtitles=None if subtitles is None else tuple(subtitles),
            loss_weight=self.row.loss_weight.get(self.stage),
            loss_scale=loss_scale,
        )


def parse_items(
    group: Group, parse: Callable[..., Annotation], *fields: str
) -> Generator[Omitted, None, list[Annotation]]:
    """Make an annotation of every item of every row; yields an `Omitted` for a faulty item, returns the annotations.

    Args:
        group: the rows.
        parse: gets the number of the row, the values of `fields`, and the generator of a text variant; it is called
            for each variant, and raises an error for a faulty item, which does not affect the others.
        fields: a single value or a list in each row, as in `Group.aligned`.
    """
    annotations = []
    for index in range(len(group.values)):
        for number, values in enumerate(group.aligned(index, *fields)):
            try:
                generators = group.generators(f"{index}/{number}")
                annotations.append(of_variants([parse(index, *values, rng) for rng in generators]))
            except Exception as error:
                yield group.omit(str(as_reject(error, f"item {number} cannot be used")), index)
    return annotations


def of_variants(drawn: Sequence[Kind]) -> Kind:
    """One annotation of those that were drawn for the text variants; the plain one if all are equal."""
    first, *others = drawn
    return replace(first, other_variants=tuple(others)) if any(other != first for other in others) else first


def pick(options: Sequence[str], rng: np.random.Generator) -> str:
    """One of several texts."""
    return options[int(rng.integers(len(options)))]


def rng_of(key: str, purpose: str) -> np.random.Generator:
    """A random generator that is seeded by an example's key and the purpose of the draw."""
    seed = hashlib.sha256(f"{purpose}\0{key}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little")))


def text_of(value: Any) -> str:
    """The value of a text column without surrounding space; None becomes "".

    A whole number is written without ".0": a column of integers with missing values is often stored as floats.

    Raises:
        RejectedError: the value is a list, an object or bytes.
    """
    if isinstance(value, list | dict | bytes):
        raise RejectedError(f"expected text, found {type(value).__name__} {str(value)[:60]!r}")
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE:
        value = int(value)
    return "" if value is None else str(value).strip()


def most_common(answer: Any, rng: np.random.Generator) -> str:
    """The most frequent of several annotators' answers; ties are drawn. A single answer is returned as is."""
    if not isinstance(answer, list):
        return text_of(answer)
    counts = Counter(text for value in answer if (text := text_of(value)))
    best = sorted(text for text, count in counts.items() if count == max(counts.values()))
    return pick(best, rng) if best else ""


def xy_pairs(points: Any) -> list[tuple[float, float]]:
    """Parse points, given as a list of {x, y}, a list of [x, y], one {x: [...], y: [...]}, or a single {x, y}."""
    if points is None:
        return []
    if isinstance(points, dict) and not isinstance(points["x"], list | None):
        points = [points]
    if isinstance(points, dict):
        return [(float(x), float(y)) for x, y in zip(points["x"] or (), points["y"] or (), strict=True)]
    pairs = [(p["x"], p["y"]) if isinstance(p, dict) else tuple(p) for p in points]
    return [(float(x), float(y)) for x, y in pairs]


def to_fractions(points: list[tuple[float, float]], scale: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """Divide points by the size of their coordinate system, (width, height), and clip them to 0 - 1.

    Raises:
        RejectedError: a point lies further outside than `OUTSIDE`: it is wrong, or has another scale.
    """
    width, height = scale
    for x, y in points:
        if not (-OUTSIDE <= x / width <= 1 + OUTSIDE and -OUTSIDE <= y / height <= 1 + OUTSIDE):
            raise RejectedError(
                f"points: {x:g}, {y:g} lies outside of {width:g} x {height:g}; correct it, or the row's `scale`"
            )
    return tuple((min(max(x / width, 0.0), 1.0), min(max(y / height, 0.0), 1.0)) for x, y in points)


def packed_points(annotations: Sequence[Points], most: int) -> Iterator[list[Points]]:
    """Group annotations into runs of at most `most` points in total; no single annotation may have more."""
    run: list[Points] = []
    for annotation in annotations:
        if run and sum(a.count for a in run) + annotation.count > most:
            yield run
            run = []
        run.append(annotation)
    if run:
        yield run


def require_annotations(annotations: Sequence[Annotation], why: str) -> Sequence[Annotation]:
    """Check that a list of annotations is not empty, and return it.

    Raises:
        RejectedError: the list is empty; the message is `why`.
    """
    if not annotations:
        raise RejectedError(why)
    return annotations
