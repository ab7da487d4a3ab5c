"""What each converter takes from a catalog row: its options, and the fields that it reads through `columns`.

One model per converter. Its pydantic fields are the options; `required` and `optional` name the fields of `columns`.
The code in `shards.convert` gets the model, and cannot read a field that is not declared here. The models are not in
`shards.convert`, because a catalog is checked with them when it is loaded: that must not import the code, which needs
the catalog itself.
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal, Self

import pydantic

from shards.catalog.nearest import nearest
from shards.catalog.row import Row, Stage, Strict
from shards.catalog.styles import style_problems

Scale = Literal["percent", "pixel", "unit", "thousand"]


class ConverterOptions(Strict):
    """Options that a catalog row gives to its converter.

    Attributes:
        required: fields that `columns` must map. "a|b" is satisfied by either of the two; "image_#" stands for image_1,
            image_2 and so on.
        optional: fields that `columns` may map.
        paired: option -> field: a row gives both or neither.
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar[dict[str, str]] = {}

    @classmethod
    def fields_read(cls) -> tuple[str, ...]:
        """All fields that the converter reads, the required ones first."""
        return tuple(name for entry in (*cls.required, *cls.optional) for name in entry.split("|"))

    @classmethod
    @functools.cache
    def reads(cls, field: str) -> bool:
        """Whether the converter reads a field."""
        return field in cls.fields_read() or re.sub(r"_\d+$", "_#", field) in cls.fields_read()


class ChatOptions(ConverterOptions):
    """Options of `chat`: `style` is the style of the conversations."""

    required = ("messages",)
    optional = ("image", "video", "start", "end")
    style: str


class DiagramChoiceOptions(ConverterOptions):
    """Options of `diagram_choice`: `annotations` is the path template of the JSON files with the boxes of the texts."""

    required = ("image", "question", "options", "answer", "letters")
    optional = ("sha256",)
    annotations: str


class IdentityQaOptions(ConverterOptions):
    """Options of `identity_qa`: `style` is the style of the questions."""

    required = ("questions", "answer")
    optional = ("images",)
    style: str


class ImageCaptionOptions(ConverterOptions):
    """Options of `image_caption`.

    Attributes:
        style: style of the captions, such as short_caption; it has the prompts of a row without the field `question`.
        transcript_stages: stages that train on the transcripts, too.
    """

    required: ClassVar[tuple[str, ...]] = ("image", "caption|transcripts")
    optional: ClassVar[tuple[str, ...]] = ("question", "sha256")
    style: str = "long_caption"
    transcript_stages: tuple[Stage, ...] = ()


class ImageChatOptions(ConverterOptions):
    """Options of `image_chat`.

    Attributes:
        style: style of the conversations.
        count_prefixes: texts of which one is put before a counting question, to distinguish it from one that is
            answered with points.
    """

    required: ClassVar[tuple[str, ...]] = ("image|image_#", "question", "answer")
    optional: ClassVar[tuple[str, ...]] = ("sha256",)
    style: str
    count_prefixes: tuple[str, ...] = ()


class ImageQaOptions(ImageChatOptions):
    """Options of `image_qa`, besides those of `image_chat`.

    Attributes:
        weights: value of the field `weight_of` -> scale of the loss.
        flat: every question is an example of its own.
    """

    optional = ("explanation", "hint", "weight_of", "sha256")
    paired: ClassVar[dict[str, str]] = {"weights": "weight_of"}
    weights: dict[str, float] | None = None
    flat: bool = False


class ImageChoiceOptions(ConverterOptions):
    """Options of `image_choice`.

    Attributes:
        style: style of a question with options.
        open_style: style of a question without options; None leaves such a question out.
        answer: form of the answer: "index" (counted from `first`), "letter" ("B", "(B) ...") or "text" (equal to an
            option).
        first: number of the first option.
        embedded: the options are the last lines of the question.
        cut: regular expression of what is removed from the question, before its options are split off.
        named_images: "<image 2>", or the second "<image>", becomes "Image 2".
        shuffle: the order of the options is drawn.
    """

    required = ("image|image_#", "question", "answer")
    optional = ("options", "hint", "sha256")
    style: str
    open_style: str | None = None
    answer: Literal["index", "letter", "text"] = "index"
    first: int = 0
    embedded: bool = False
    cut: str | None = None
    named_images: bool = False
    shuffle: bool = False


class ImagePointsOptions(ConverterOptions):
    """Options of `image_points`.

    Attributes:
        scale: unit of the coordinates: percent, pixels, 0 - 1 or 0 - 1000.
        styles: an example is made for each; stage "eval" takes only the first.
        max_points: labels with more points are left out; an example has at most as many in total.
        lower_labels: labels are written in small letters.
    """

    required = ("image", "label")
    optional = ("points", "question", "number", "sha256")
    scale: Scale
    styles: tuple[str, ...] = pydantic.Field(min_length=1)
    max_points: int = pydantic.Field(gt=0)
    lower_labels: bool = False


class MultiImagePointsOptions(ConverterOptions):
    """Options of `multi_image_points`.

    Attributes:
        scale: unit of the coordinates: percent, 0 - 1 or 0 - 1000.
        styles: one is drawn for each example.
        max_points: an example with more points is left out.
        ask_some: style -> questions about some of the images, with {label} and {images}; one is drawn.
    """

    required = ("image|image_#", "labels", "points")
    optional = ("sha256", "normalized")
    scale: Literal["percent", "unit", "thousand"]
    styles: tuple[str, ...] = pydantic.Field(min_length=1)
    max_points: int = pydantic.Field(gt=0)
    ask_some: dict[str, tuple[str, ...]]

    @pydantic.model_validator(mode="after")
    def _texts_for_every_style(self) -> Self:
        if missing := [style for style in self.styles if not self.ask_some.get(style)]:
            raise ValueError(f"ask_some has no questions for {', '.join(missing)}")
        return self


class VideoCaptionOptions(ConverterOptions):
    """Options of `video_caption`: `min_score` is the least value of the field `score` of a caption that is used.

    The other fields are styles of captions.
    """

    required = ("video",)
    optional = (
        "score",
        "start",
        "end",
        "video_short_caption",
        "video_merged_caption",
        "video_long_caption",
        "video_motion_caption",
    )
    paired: ClassVar[dict[str, str]] = {"min_score": "score"}
    min_score: float | None = None


class VideoPointsOptions(ConverterOptions):
    """Options of `video_points`.

    Attributes:
        scale: unit of the coordinates; "pixel" refers to the fields `width` and `height`.
        styles: one is drawn for each label.
        max_points: labels with more points are left out.
        max_seconds: a longer video is shown in part, and a longer clip is left out.
        lower_labels: labels are written in small letters.
        multi_turn: share of text variants in which the questions about a whole video are one conversation.
    """

    required = ("video", "label", "times", "points")
    optional = ("question", "unsure", "start", "end", "duration", "width", "height")
    scale: Scale = "percent"
    styles: tuple[str, ...] = pydantic.Field(min_length=1)
    max_points: int = pydantic.Field(gt=0)
    max_seconds: float = math.inf
    lower_labels: bool = False
    multi_turn: float = pydantic.Field(default=0.0, ge=0, le=1)


class VideoTrackOptions(ConverterOptions):
    """Options of `video_track`.

    Attributes:
        style: style of the questions.
        sampling_fps: answers per second; None takes the field `sampling_fps`.
    """

    required = ("video", "label", "width", "height", "frames|objects")
    optional = ("sampling_fps", "fps", "image_fps", "native_fps")
    style: str
    sampling_fps: float | None = pydantic.Field(default=None, gt=0)


class VideoQuestionOptions(ConverterOptions):
    """Options that all converters of questions about videos have; by itself those of `video_embedded_choice`.

    Attributes:
        max_per_example: maximum number of questions of an example; None: any number.
        image_fps: images per second, if the video is a folder of images.
    """

    required: ClassVar[tuple[str, ...]] = ("video", "question", "answer")
    optional: ClassVar[tuple[str, ...]] = ("subtitles",)
    max_per_example: int | None = pydantic.Field(default=None, gt=0)
    image_fps: float | None = pydantic.Field(default=None, gt=0)


class VideoConversationOptions(VideoQuestionOptions):
    """Options of `video_conversation`: `style` is the style of every question."""

    required = ("video", "turns")
    style: str


class VideoSpansOptions(VideoQuestionOptions):
    """Options of `video_spans`.

    Attributes:
        style: style of the questions.
        questions: texts with {start} and {end}, of which one is drawn.
        full_stop: a full stop is added to an answer without a final mark.
    """

    required = ("video", "spans", "text")
    style: str
    questions: tuple[str, ...] = pydantic.Field(min_length=1)
    full_stop: bool = False


class VideoQaOptions(VideoQuestionOptions):
    """Options of `video_qa`.

    Attributes:
        ask: forms of a question with options; stage "eval" asks it only openly if "open" is among them.
        open_style: style of an open question without a field `style`; None leaves out a question without options.
        answer: form of the answer: "index" (counted from `first`), "letter", "text" (equal to an option), or "marks"
            (the field `marks` has one for each option; "correct" is the right one). If a text is none of the options
            and `ask` has "open", the question is an open one.
        first: number of the first option.
        embedded: the options are the last lines of the question.
        cut: regular expression of what is removed from the question, before its options are split off.
        questions: questions of which one is drawn if the row has none, with {label} and {label_lower}.
        also: wrong options that are added to the field `negatives`.
        replace: text -> text that replaces it in answers and options.
        drop: regular expression of what is removed at the start of answers and options.
        full_stop: a full stop is added to an open answer without a final mark.
        question_mark: a question mark is added to a question without a final mark.
    """

    required = ("video", "answer|windows")
    optional = (
        *("question", "question_pool", "label", "style"),
        *("options", "option_#", "negatives", "negative_#", "marks"),
        *("start", "end", "span", "subtitles"),
    )
    ask: tuple[Literal["choice", "open"], ...] = pydantic.Field(default=("open",), min_length=1)
    open_style: str | None = None
    answer: Literal["index", "letter", "text", "marks"] = "index"
    first: int = 0
    embedded: bool = False
    cut: str | None = None
    questions: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    replace: dict[str, str] = pydantic.Field(default_factory=dict)
    drop: str | None = None
    full_stop: bool = False
    question_mark: bool = False


CONVERTER_OPTIONS: dict[str, type[ConverterOptions]] = {
    "chat": ChatOptions,
    "diagram_choice": DiagramChoiceOptions,
    "identity_qa": IdentityQaOptions,
    "image_caption": ImageCaptionOptions,
    "image_chat": ImageChatOptions,
    "image_choice": ImageChoiceOptions,
    "image_points": ImagePointsOptions,
    "image_qa": ImageQaOptions,
    "multi_image_points": MultiImagePointsOptions,
    "video_caption": VideoCaptionOptions,
    "video_conversation": VideoConversationOptions,
    "video_embedded_choice": VideoQuestionOptions,
    "video_points": VideoPointsOptions,
    "video_qa": VideoQaOptions,
    "video_spans": VideoSpansOptions,
    "video_track": VideoTrackOptions,
}


def converter_problems(row: Row, styles: Collection[str] = ()) -> list[str]:
    """What in a row does not fit its converter: unknown or missing names, options, fields or styles. Empty if it fits.

    `styles`: styles that the catalog adds to the known ones.
    """
    return [f"row {row.name}: {problem}" for problem in _problems(row, styles)]


def _problems(row: Row, styles: Collection[str]) -> Iterator[str]:
    model = CONVERTER_OPTIONS.get(row.converter)
    if model is None:
        yield f"no converter {row.converter!r}; {nearest(row.converter, CONVERTER_OPTIONS)}"
        return
    try:
        model.model_validate(row.options)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            yield _option_problem(row, model, problem)
    else:
        yield from style_problems(row.converter, row.options, row.columns, styles)
    in_media = {name for text in row.media for _, name, _, _ in string.Formatter().parse(text) if name}
    for field, column in row.columns.items():
        if not model.reads(field) and column not in in_media:
            hint = nearest(field, model.fields_read())
            yield f"columns.{field}: converter {row.converter} reads no such field; {hint}"
    for entry in model.required:
        if not any(re.sub(r"_\d+$", "_#", field) in entry.split("|") for field in row.columns):
            yield f"columns: converter {row.converter} needs the field {entry.replace('|', ' or ').replace('#', '1')}"
    for option, field in model.paired.items():
        if (row.options.get(option) is None) != (field not in row.columns):
            yield f"options.{option} and columns.{field} belong together; give both or neither"


def _option_problem(row: Row, model: type[ConverterOptions], problem: Any) -> str:
    place = ".".join(map(str, ("options", *problem["loc"])))
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        hint = nearest(str(problem["loc"][0]), model.model_fields)
        return f"{place}: converter {row.converter} has no such option; {hint}"
    if problem["type"] == "missing":
        return f"{place}: converter {row.converter} needs this option"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')} (given: {str(problem['input'])[:60]!r})"
