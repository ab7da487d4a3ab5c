"""Prompts: it renders an annotation as the messages of user and assistant, before tokenization.

There are two ways to condition on the kind of answer. In pretraining ("style_and_length_v2") the user's message has the
style and a noisy hint of the answer's length: "long_caption 52:". Later ("demo_or_style_v2") questions are in natural
language, and only academic styles keep their name: "vqa2: What colour is the car?". The wording of questions that the
data does not have is in the folder `templates`, and so are forms that wrap a question of the data, such as a request
for a short answer. Every draw comes from the given generator; without one, everything has its evaluation form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from molmo2.processing.choice import render_choice
from molmo2.processing.contract import TEMPLATES_FOLDER, templates
from molmo2.processing.frames import FRAME_REACH
from molmo2.processing.points import SEPARATORS, format_points, format_tracks
from shards.schema import Annotation, Chat, Choice, PointGroup, Points, RejectedError, Text, TrackGroup, Tracks

# Styles whose questions are in natural language after pretraining; all others begin with the style's name.
# `chat_template.jinja` has the same list.
PLAIN_STYLES = frozenset(
    "point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption "
    "video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end video_transcript "
    "video_clip_caption_start_end video_clip_caption_start_end_in_seconds video_clip_transcript_start_end "
    "video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp "
    "video_frame_caption_timestamp_in_seconds correction_qa text_sft video_point video_point_count video_count "
    "video_count_point multi_image_pointing multi_image_counting multi_image_point_then_count "
    "multi_image_count_then_point".split()
)
_COUNT_FIRST = frozenset({"count_then_point", "video_count_point", "multi_image_count_then_point"})
_COUNT_ONLY = frozenset({"count", "video_count", "multi_image_counting"})
_POINT_FIRST = frozenset({"point_count", "point_then_count", "video_point_count", "multi_image_point_then_count"})
# A question about all images is often asked like one about a single image.
_PLAIN_FORMS, _PLAIN_SHARE = {"multi_image_pointing": "pointing"}, 0.5

# The length hint: its probability, the standard deviation of its noise and its unit (characters), and the fixed hint
# without a generator (units).
_HINT_SHARE, _HINT_NOISE, _HINT_UNIT, _HINT_DEFAULT = 0.9, 25, 15, 65
_LATER_START_SHARE = 0.2  # probability that a single-object track may start after the first visible frame
_PLAIN_FPS = 2.0  # a tracking question at this rate may leave the rate out


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "user" or "assistant"."""

    role: str
    content: str


def render_messages(
    annotation: Annotation, mode: str, rng: np.random.Generator | None, *, video: bool
) -> tuple[Message, ...]:
    """The messages of one annotation, user first.

    Args:
        annotation: the question and answer.
        mode: "pretraining", "sft" or "eval"; "eval" has the questions of "sft".
        rng: source of every draw; None gives the evaluation form.
        video: whether points have a time in seconds instead of an image number.

    Raises:
        RejectedError: turns do not alternate, or the style has neither a question nor a template.
    """
    if isinstance(annotation, Chat):
        return _chat(annotation, mode, rng)
    if isinstance(annotation, Choice):
        question, answer = render_choice(annotation, rng)
    elif isinstance(annotation, Points):
        question, answer = _points(annotation, mode, rng, video)
    elif isinstance(annotation, Tracks):
        question, answer = _tracks(annotation, mode, rng)
    else:
        question, answer = annotation.question, annotation.answer
        if mode != "pretraining":
            question = _open_question(annotation, rng)
    prefix = _prefix(annotation, answer, mode, rng)
    return Message("user", " ".join(filter(None, [prefix, question]))), Message("assistant", answer)


def _prefix(annotation: Annotation, answer: str, mode: str, rng: np.random.Generator | None) -> str:
    style = annotation.style
    if mode != "pretraining":
        plain = style in PLAIN_STYLES or isinstance(annotation, Choice) or "multiple_choice" in style
        return "" if plain else f"{style}:"
    if isinstance(annotation, Points | Tracks):  # the number of points determines the length
        return f"{style}:"
    if rng is None:
        return f"{style} {_HINT_DEFAULT}:"
    noisy = max(0, len(answer) + int(rng.normal(0, _HINT_NOISE)))  # the noise may be larger than the length
    return f"{style} {noisy // _HINT_UNIT}:" if rng.random() < _HINT_SHARE else f"{style}:"


def _pick(options: list[str], rng: np.random.Generator | None) -> str:
    return options[0 if rng is None else int(rng.integers(len(options)))]


def _template(style: str, rng: np.random.Generator | None, **values: str) -> str:
    """A random template of the style with its {names} replaced; "" for an academic style without templates."""
    options = templates().get(style)
    if options is None:
        if style in PLAIN_STYLES or values:
            raise RejectedError(f"style {style!r} has neither a question nor a template in {TEMPLATES_FOLDER.name}/")
        return ""
    text = _pick(options, rng)
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def _open_question(text: Text, rng: np.random.Generator | None) -> str:
    """The question of the data in one of the style's forms if they have a place for it; else it, or a template."""
    wrapped = any("{question}" in form for form in templates().get(text.style, ()))
    if not wrapped:
        return text.question or _template(text.style, rng)
    if not text.question:
        raise RejectedError(f"style {text.style!r} needs a question")
    return _template(text.style, rng, question=text.question)


def _chat(chat: Chat, mode: str, rng: np.random.Generator | None) -> tuple[Message, ...]:
    roles = [turn.role for turn in chat.turns]
    if not roles or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]:
        raise RejectedError(f"turns must alternate user, assistant, ...; found {roles}")
    answers = [turn.text for turn in chat.turns if turn.role == "assistant"]
    prefix = _prefix(chat, answers[-1] if answers else "", mode, rng)  # as in Molmo2, the hint is of the last answer
    first = " ".join(filter(None, [prefix, chat.turns[0].text]))
    return Message("user", first), *(Message(turn.role, turn.text) for turn in chat.turns[1:])


def _separator(mode: str) -> str:
    return SEPARATORS["html-v1" if mode == "pretraining" else "html-v2"]


def _points(points: Points, mode: str, rng: np.random.Generator | None, video: bool) -> tuple[str, str]:
    multi = points.style.startswith("multi_image")
    label = points.label
    if mode == "pretraining":
        question = points.question or label
    elif points.question:
        question = points.question
    else:
        plain = multi and rng is not None and points.style in _PLAIN_FORMS and rng.random() < _PLAIN_SHARE
        question = _template(_PLAIN_FORMS[points.style] if plain else points.style, rng, label=label)
    text = format_points(points.groups, label, seconds=video, separator=_separator(mode))
    if points.style in _COUNT_ONLY or points.number is not None:
        return question, str(points.count)
    if points.count == 0:
        return question, "There are none."
    if points.style in _COUNT_FIRST:
        return question, f"There are {points.count} {text}."
    if points.style in _POINT_FIRST:
        return question, f"Counting the {text} shows a total of {points.count}."
    return question, text


def _tracks(tracks: Tracks, mode: str, rng: np.random.Generator | None) -> tuple[str, str]:
    groups, separator = tracks.groups, _separator(mode)
    values = {"label": tracks.label}
    single, ends = tracks.style.startswith("video_single_point_track"), tracks.style.endswith("start_end")
    if not ends:
        groups = tuple(group for group in groups if _is_answered(group.time, tracks.fps))
    if single:
        start = _question_point(tracks, rng)
        groups = tuple(group for group in groups if group.time > start.at)
        values = {"point": format_points([start], tracks.label, seconds=True, separator=separator)}
    if ends:
        groups = _ends(groups)
    question = _template(tracks.style, rng, **values)
    if mode == "pretraining":
        question = " ".join(values.values())
    elif single or (not ends and (tracks.fps != _PLAIN_FPS or (rng is not None and rng.random() < 0.5))):
        question += " " + _template("track_fps", rng, fps=f"{tracks.fps:g}")
    return question, format_tracks(groups, tracks.label, separator=separator)


def _is_answered(time: float, fps: float) -> bool:
    """Whether a frame stands on the grid of `fps` answers per second."""
    return abs(time - round(time * fps) / fps) <= FRAME_REACH


def _question_point(tracks: Tracks, rng: np.random.Generator | None) -> PointGroup:
    """The point that a question about a single object gives: its first, or in some draws that of any frame."""
    visible = [group for group in tracks.groups if group.objects]
    if not visible:
        raise RejectedError(f"style {tracks.style!r}: the object is visible in no frame")
    later = rng is not None and rng.random() < _LATER_START_SHARE
    start = visible[int(rng.integers(len(visible)))] if later and rng is not None else visible[0]
    return PointGroup(at=start.time, points=tuple((x, y) for _, x, y in start.objects))


def _ends(groups: tuple[TrackGroup, ...]) -> tuple[TrackGroup, ...]:
    """The groups with only the first and the last frame of each object; where it is occluded there, it is missing."""
    frames: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        for obj in (*(obj for obj, _, _ in group.objects), *group.occluded):
            frames.setdefault(obj, []).append(i)
    ends = {(frame, obj) for obj, seen in frames.items() for frame in (seen[0], seen[-1])}
    return tuple(
        replace(group, objects=tuple(point for point in group.objects if (i, point[0]) in ends))
        for i, group in enumerate(groups)
    )
