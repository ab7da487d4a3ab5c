"""The records that travel on the build side: Example (neutral) and Sample (what a shard stores).

A source yields rows, a converter turns a row into an `Example`, the model's processor turns an `Example` into a
`Sample`, the writer stores it. Coordinates are fractions of width and height (0-1) and times are seconds from the
start of the clip, whatever the source used. Tokens and geometry are not here: they belong to the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


class RejectedError(ValueError):
    """An example that cannot become a sample. The builder counts it and records it in `rejects.jsonl`."""


class OverlongError(RejectedError):
    """A tree of several annotations that do not fit one sample together; parts of it may."""


class FilteredError(RejectedError):
    """An example that the catalog leaves out on purpose: recorded, but no fault and not counted as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an example comes from: the file it was read from and the row in it (0-based)."""

    file: str
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """An encoded image: a local path, or the bytes themselves."""

    path: str | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoRef:
    """A video, or the part of it between `start` and `end` (seconds).

    `path` is a file or, where `fps` is given, a folder with an image for each frame, in the order of their names.
    """

    path: str
    start: float | None = None
    end: float | None = None
    fps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """A line of subtitles with its times, seconds from the start of the clip; without times it belongs to all of it."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotated:
    """What every annotation has.

    `facts`: what a metric reads beside the answer, columns of the source by the names of the catalog's `facts`. They
    are kept in stage "eval" alone.
    """

    style: str
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Annotated):
    """A caption (no question) or an open question with its answer."""

    answer: str
    question: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Annotated):
    """A multiple-choice question; `answer` is an index into `options`.

    Options that are labels themselves, letters drawn on an image for instance, are not `labelled` once more.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    labelled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Annotated):
    """A conversation of several turns."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointGroup:
    """Points in one image or frame. `at`: image number from 1, or seconds; points: (x, y) fractions."""

    at: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Annotated):
    """Everything that `label` names, pointed at. No groups means that there is none.

    `number` says how many there are where nobody has pointed at them.
    """

    label: str
    groups: tuple[PointGroup, ...]
    question: str = ""
    number: int | None = None

    @property
    def count(self) -> int:
        """Number of points in all groups, or `number`."""
        return sum(len(group.points) for group in self.groups) if self.number is None else self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackGroup:
    """Visible objects of one frame: `time` in seconds, objects as (object id, x, y)."""

    time: float
    objects: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks(Annotated):
    """Objects named by `label`, followed through a video at `fps` answers per second."""

    label: str
    fps: float
    groups: tuple[TrackGroup, ...]


Annotation = Text | Choice | Chat | Points | Tracks


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One visual input (nothing, images, or one video) and its annotations: a message tree.

    `key` is unique in its dataset and matches `format.KEY_PATTERN`. `loss_weight` is the dataset's flat weight of a
    loss token; None means the processor's length rule. `loss_scale` multiplies either.
    """

    key: str
    dataset: str
    source: Source
    annotations: tuple[Annotation, ...]
    images: tuple[ImageRef, ...] = ()
    video: VideoRef | None = None
    subtitles: tuple[Cue, ...] = ()
    loss_weight: float | None = None
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one sample may use at most; the builder hands them to the processor with every example.

    `max_crops` counts ViT inputs: 1 per frame, 1 + tiles per image. `image_crops` is the most tiles of one image's
    canvas; `pointing_crops`, if given, is used instead in 30 % of the variants that point in images.
    """

    sequence_length: int
    max_crops: int
    max_frames: int = 128
    fps: float = 2.0
    max_images: int = 5
    image_crops: int = 8
    pointing_crops: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a shard stores for one example.

    `variants`: K arrays of `format.TOKEN_DTYPE`, visual placeholders unexpanded. `images`: JPEG files, stored as
    `000.jpg`, `001.jpg`, … `asked`: in stage "eval" the annotation of every branch. `record`: the readable JSON,
    `docs/shard-format.md` lists its fields; the reader uses `record["visuals"]` and
    `record["variants"][k].get("visuals")`.
    """

    key: str
    record: dict[str, Any]
    variants: tuple[npt.NDArray[np.void], ...]
    images: tuple[bytes, ...] = ()
    asked: tuple[Annotation, ...] = ()
