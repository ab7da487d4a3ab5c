"""The records of a build: Example (independent of the model) and Sample (what a shard stores).

A source yields rows, a converter turns rows into an `Example`, the model's processor turns an `Example` into a
`Sample`, and the writer stores it. Coordinates are fractions of width and height (0-1) and times are seconds from the
start of the clip, whatever units the source uses. Tokens and geometry belong to the processor.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Errors of the system that the path in a row causes; None is an OSError of a library, such as a decoder.
NAMED_BY_ROWS = frozenset(
    {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EACCES}
)


class RejectedError(ValueError):
    """An example cannot become a sample. The builder counts it and records it in `rejects.jsonl`."""


def as_reject(error: Exception, doing: str) -> RejectedError:
    """The reject that an exception of one row or example becomes; `doing` says what failed.

    Decoders, tokenizers and converters raise exceptions of any type for odd values. Only an error of the machine, such
    as a full or failing disk, is no fault of a row: it is raised again.
    """
    if isinstance(error, RejectedError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in NAMED_BY_ROWS):
        raise error
    return RejectedError(f"{doing}: {type(error).__name__}: {error}")


class MissingMediaError(RejectedError):
    """A media file that a download has on record as failed: the row is left out, and does not count as a fault."""


class OverlongError(RejectedError):
    """A message tree has too many annotations for one sample; a part of the tree may fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Origin of an example: the file that it was read from, and the row in that file (0-based)."""

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

    `path` is a file or, if `fps` is given, a folder with one image per frame, sorted by name.
    """

    path: str
    start: float | None = None
    end: float | None = None
    fps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """A line of subtitles and its times, seconds from the start of the clip; None is the whole clip."""

    text: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotated:
    """Base class of all annotations.

    `facts`: values that a metric reads beside the answer, by the names in the catalog row's `facts`. They are kept
    in stage "eval" only. `other_variants`: what takes the place of this annotation in the text variants 1, 2, ... of
    the sample, if a converter draws anew for each; empty if all variants have this annotation.
    """

    style: str
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    other_variants: tuple[Annotation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Annotated):
    """A caption (no question) or an open question with its answer."""

    answer: str
    question: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Annotated):
    """A multiple-choice question; `answer` is an index into `options`.

    `labelled` is False if the options are labels themselves, such as letters drawn on an image.
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
    """Points in one image or frame. `at`: image number from 1, or seconds; `points`: (x, y) as fractions."""

    at: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Annotated):
    """The points of all objects that `label` names. No groups means that there is no such object.

    `number` is the count of the objects in a dataset that has counts without points.
    """

    label: str
    groups: tuple[PointGroup, ...]
    question: str = ""
    number: int | None = None

    @property
    def count(self) -> int:
        """Number of objects: `number` if it is given, else the points of all groups."""
        return sum(len(group.points) for group in self.groups) if self.number is None else self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackGroup:
    """Objects of one frame: `time` in seconds, `objects` as (object id, x, y), x and y as fractions.

    `occluded`: ids of objects that are annotated in this frame, but cannot be seen.
    """

    time: float
    objects: tuple[tuple[int, float, float], ...]
    occluded: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks(Annotated):
    """Objects named by `label`, followed through a video; a question asks for `fps` answers per second.

    `groups` are all annotated frames. `video_fps` is the rate of the video in their time base; None is its own rate.
    """

    label: str
    fps: float
    groups: tuple[TrackGroup, ...]
    video_fps: float | None = None


Annotation = Text | Choice | Chat | Points | Tracks


def in_variant(annotation: Annotation, variant: int) -> Annotation:
    """The annotation as text variant `variant` has it; variants beyond those that were drawn begin again."""
    drawn = (annotation, *annotation.other_variants)
    return drawn[variant % len(drawn)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One visual input (nothing, images, or one video) and its annotations: a message tree.

    `key` is unique in its dataset and matches `format.KEY_PATTERN`. `loss_weight` is the dataset's flat weight of a
    loss token; None means the processor's length rule. `loss_scale` multiplies either. `subtitles` is None for a
    dataset without subtitles, and empty if nothing is said in the clip. `multi_turn` is the share of text variants in
    which the annotations are turns of one conversation and no branches of a tree.
    """

    key: str
    dataset: str
    source: Source
    annotations: tuple[Annotation, ...]
    images: tuple[ImageRef, ...] = ()
    video: VideoRef | None = None
    subtitles: tuple[Cue, ...] | None = None
    loss_weight: float | None = None
    loss_scale: float = 1.0
    multi_turn: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper limits of one sample; the builder passes them to the processor with every example.

    `max_crops` counts ViT inputs: 1 per frame, 1 + tiles per image. `image_crops` is the largest
    number of tiles of an image's canvas; `pointing_crops`, if given, replaces it in 30 % of the variants that point in
    images.
    """

    sequence_length: int
    max_crops: int
    max_frames: int = 128
    fps: float = 2.0
    max_images: int = 5
    image_crops: int = 8
    pointing_crops: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureNotes:
    """What is peculiar about an image (`shards.media.images`), and a hash of its pixels."""

    kinds: tuple[str, ...]
    pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a shard stores for one example.

    `variants`: K arrays of `format.TOKEN_DTYPE`, visual placeholders unexpanded. `images`: JPEG files, stored as
    `000.jpg`, `001.jpg`, … `asked`: the annotation of every branch, in stage "eval" only. `record`: the JSON of the
    sample; `docs/shard-format.md` lists its fields, and the reader uses `record["visuals"]` and
    `record["variants"][k].get("visuals")`. `pictures`: notes on the example's images, for the report of the build; they
    are not stored.
    """

    key: str
    record: dict[str, Any]
    variants: tuple[npt.NDArray[np.void], ...]
    images: tuple[bytes, ...] = ()
    asked: tuple[Annotation, ...] = ()
    pictures: tuple[PictureNotes, ...] = ()
