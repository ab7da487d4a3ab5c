"""Converters of questions about a video: multiple choice, open, or both; captions of parts; conversations.

A field may be a value or a list, as in `shards.convert.image_questions`. The rows of a group make an example per clip
of the video. Times in the rows are relative to the video, and times of an example to the start of its clip.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shards.catalog.converters import (
    VideoConversationOptions,
    VideoQaOptions,
    VideoQuestionOptions,
    VideoSpansOptions,
)
from shards.convert.answer_options import ParsedQuestion, right_option, split_question
from shards.convert.common import (
    Group,
    Omitted,
    most_common,
    of_variants,
    parse_items,
    pick,
    require_annotations,
    text_of,
)
from shards.schema import Annotation, Choice, Cue, Example, RejectedError, Text

Clip = tuple[float | None, float | None]
WHOLE: Clip = (None, None)
CLOCK_SHARE = 0.5  # probability that the times in a question are HH:MM:SS.s instead of seconds, in training
CHOICE_STYLE = "video_multiple_choice"

_NUMBER = r"\d+(?:\.\d+)?"
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_SPAN = re.compile(rf"\s*\[?\s*({_NUMBER})\s*[-:]\s*({_NUMBER})\s*\]?\s*")
_OPTION_NAME = re.compile(r"\s*Options?\s*\d+\s*[:.)]\s*", re.IGNORECASE)
_EMBEDDED = re.compile(r"(?P<question>.*)\n\s*The Options are:\s*(?P<options>\[.*\])\s*", re.DOTALL | re.IGNORECASE)


def video_qa(group: Group, options: VideoQaOptions) -> Iterator[Example | Omitted]:
    """Convert questions in the forms that `options.ask` lists.

    Answer options are the field `options`, the fields `option_0`, `option_1`, ..., or the `answer` and the `negatives`
    (or `negative_0`, ...; and `options.also`) in a drawn order; blank ones are left out. Without options, the field
    `windows`, a list of [start, end] in seconds, may be the answer. Without a question, one is drawn from the field
    `question_pool` or `options.questions`; if no row has one, a second equal answer for a clip is left out.
    """
    with_open = "open" in options.ask
    with_choice = "choice" in options.ask and not (with_open and group.stage == "eval")
    clips: dict[Clip, list[Annotation]] = {}
    seen: set[tuple[Clip, str, str]] = set()
    left_out = 0
    for index in range(len(group.values)):
        try:
            clip, questions = _clip(group, index), list(_questions(group, options, index))
        except RejectedError as error:
            yield group.omit(str(error), index)
            left_out += 1
            continue
        for number, values in enumerate(questions):
            try:
                drawn = [_asked(options, values, rng) for rng in group.generators(f"{index}/{number}")]
            except RejectedError as error:
                yield group.omit(str(error), index)
                left_out += 1
                continue
            asked = drawn[0]
            identity = (clip, text_of(values.get("label")), asked.answer)
            if not group.maps("question") and identity in seen:
                yield group.omit(f"the same answer twice for one clip: {asked.answer!r}", index)
                continue
            seen.add(identity)
            style = text_of(values.get("style")) or options.open_style or ""
            if with_choice and asked.right is not None:
                clips.setdefault(clip, []).append(of_variants([asked.as_choice(CHOICE_STYLE) for asked in drawn]))
            if with_open or asked.right is None:
                clips.setdefault(clip, []).append(of_variants([asked.as_text(style) for asked in drawn]))
    if clips or not left_out:  # otherwise every row was reported as omitted
        yield from examples_of(group, options, clips)


def video_spans(group: Group, options: VideoSpansOptions) -> Iterator[Example | Omitted]:
    """Convert a video with captions of its parts: lists of spans and texts in a row, or one of each.

    Times in a question are in seconds, or half the time HH:MM:SS.s.
    """

    def parse(index: int, text: Any, span: Any, rng: np.random.Generator) -> Text:
        start, end = map(float, span)
        if not start < end or not text_of(text):
            raise RejectedError(f"a part from {start} to {end} s, or one without text")
        clock = group.stage != "eval" and rng.random() < CLOCK_SHARE
        first, last = (clock_time(time) if clock else f"{time:.1f}" for time in (start, end))
        return Text(
            style=options.style,
            question=pick(options.questions, rng).format(start=first, end=last),
            answer=_with_full_stop(text_of(text)) if options.full_stop else text_of(text),
        )

    annotations = yield from parse_items(group, parse, "text", "spans")  # a text is no list, but a single span is
    yield from examples_of(group, options, {WHOLE: annotations})


def video_conversation(group: Group, options: VideoConversationOptions) -> Iterator[Example | Omitted]:
    """Convert turns of a "human" and a model: each pair is a question, answer options included."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        turns = group.items("turns", index)
        for human, model in zip(turns[::2], turns[1::2], strict=False):
            question = text_of(human.get("value")).removeprefix("<image>").strip()
            answer = text_of(model.get("value"))
            if (human.get("from"), model.get("from")) != ("human", "gpt") or not question or not answer:
                yield group.omit("turns that do not alternate, or an empty one", index)
                continue
            annotations.append(Text(style=options.style, question=question, answer=answer))
    yield from examples_of(group, options, {WHOLE: annotations})


def video_embedded_choice(group: Group, options: VideoQuestionOptions) -> Iterator[Example | Omitted]:
    """Convert multiple choice with "The Options are: [...]" at the end of the question; the answer counts from 1.

    The options lose their names "Option 1:" and so on, because the processor gives them labels.
    """

    def parse(index: int, question: Any, answer: Any, rng: np.random.Generator) -> Choice:
        match = _EMBEDDED.fullmatch(text_of(question))
        given = ast.literal_eval(match["options"]) if match else ()
        texts = tuple(_OPTION_NAME.sub("", text_of(option), count=1) for option in given)
        if not match:
            raise RejectedError("no options in the question")
        right = right_option("index", answer, texts, first=1)
        text = re.sub(r"\bThe Question is:\s*", "", match["question"], flags=re.IGNORECASE).strip()
        return Choice(style=CHOICE_STYLE, question=text, options=texts, answer=right)

    annotations = yield from parse_items(group, parse, "question", "answer")
    yield from examples_of(group, options, {WHOLE: annotations})


def examples_of(group: Group, options: VideoQuestionOptions, clips: dict[Clip, list[Annotation]]) -> Iterator[Example]:
    """Make an example per clip, or several if it has more than `options.max_per_example` annotations.

    Raises:
        RejectedError: there is no annotation.
    """
    require_annotations([item for annotations in clips.values() for item in annotations], "no question with an answer")
    runs = [
        (clip, number, run)
        for number, (clip, annotations) in enumerate(clips.items())
        for run in _balanced(annotations, options.max_per_example)
    ]
    for place, ((start, end), number, run) in enumerate(runs):
        video = group.media.video(group.text("video"), start, end, group.values[0], options.image_fps)
        suffix = f"-{number}-{place}" if len(runs) > 1 else ""
        subtitles = list(_cues(group, start or 0.0, end)) if group.maps("subtitles") else None
        yield group.example(run, video=video, subtitles=subtitles, suffix=suffix)


def _balanced(annotations: list[Annotation], most: int | None) -> list[list[Annotation]]:
    """As few runs of at most `most` annotations as possible, whose lengths differ by at most one."""
    number = math.ceil(len(annotations) / (most or max(1, len(annotations))))
    bounds = [len(annotations) * place // number for place in range(number + 1)] if number else []
    return [annotations[first:last] for first, last in itertools.pairwise(bounds)]


def _clip(group: Group, index: int) -> Clip:
    """The clip of a row: fields `start` and `end`, or the field `span`: [3.5, 7], "3.5-7" or "[3.5:7]"."""
    start: float | None
    end: float | None
    if isinstance(given := group.get("span", index), list):
        start, end = map(float, given)
    elif group.maps("span"):
        span = _SPAN.fullmatch(group.text("span", index))
        if span is None:
            raise RejectedError(f"column {group.row.columns['span']}: no span of time in {group.get('span', index)!r}")
        start, end = float(span[1]), float(span[2])
    else:
        start, end = (_seconds(group.get(field, index)) for field in ("start", "end"))
    if start is not None and end is not None and not start < end:
        raise RejectedError(f"a clip from {start} to {end} s")
    return start, end


def clock_time(seconds: float) -> str:
    """A time as HH:MM:SS.s."""
    tenths = round(10 * seconds)
    return f"{tenths // 36000:02d}:{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def _seconds(value: Any) -> float | None:
    """Parse a time, given in seconds or as HH:MM:SS.mmm."""
    if value in (None, ""):
        return None
    clock = _CLOCK.fullmatch(str(value))
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else float(value)


def _questions(group: Group, options: VideoQaOptions, index: int) -> Iterator[dict[str, Any]]:
    """Yield the field values of each question of a row; "pool" holds the questions to draw from if it has none."""
    pool = group.items("question_pool", index) or options.questions
    known = ("question", "answer", "options", "marks", "negatives", "style", "label")
    fields = [field for field in known if group.maps(field)]
    for values in group.aligned(index, *fields):
        item = {**dict(zip(fields, values, strict=True)), "pool": pool, "windows": group.items("windows", index)}
        for kind in ("option", "negative"):
            if columns := group.numbered(kind):
                item[f"{kind}s"] = [group.get(field, index) for field in columns]
        yield item


def _asked(options: VideoQaOptions, values: Mapping[str, Any], rng: np.random.Generator) -> ParsedQuestion:
    """A question of a row.

    Raises:
        RejectedError: the question or its answer is empty, or the answer names no option.
    """
    question, pool = text_of(values.get("question")), values["pool"]
    if not question and pool:
        question = text_of(pick(pool, rng))
        label = text_of(values.get("label"))
        question = question.replace("{label}", label).replace("{label_lower}", label.lower())
    question, texts = split_question(question, values.get("options"), options.cut, options.embedded)
    if options.question_mark and question and question[-1] not in ".!?":
        question += "?"
    texts = [_clean(options, text) for text in texts]
    if negatives := [text for value in values.get("negatives") or () if (text := _clean(options, value))]:
        answer = _clean(options, values.get("answer"))
        others = (*(text for text in negatives if text != answer), *options.also)
        asked = ParsedQuestion(question, answer, (answer, *others), 0).shuffled(rng)
    elif any(texts):
        asked = _with_options(options, question, texts, values)
    elif windows := values["windows"]:
        asked = ParsedQuestion(question, "Segments: " + ", ".join(f"[{start:g}-{end:g}]" for start, end in windows))
    else:
        answer = _clean(options, most_common(values.get("answer"), rng))
        asked = ParsedQuestion(question, _with_full_stop(answer) if options.full_stop else answer)
    if not asked.question or not asked.answer:
        raise RejectedError("an empty question or answer")
    if asked.right is None and options.open_style is None and not values.get("style"):
        raise RejectedError("no options to choose from")
    return asked


def _with_options(
    options: VideoQaOptions, question: str, texts: list[str], values: Mapping[str, Any]
) -> ParsedQuestion:
    """A question with the options `texts`; an open one if its answer is a text that is none of them, and may be open.

    Raises:
        RejectedError: the answer is empty, or names no option.
    """
    answer = _clean(options, values.get("answer"))
    if options.answer == "text" and "open" in options.ask and answer not in texts:
        return ParsedQuestion(question, answer)
    named = values.get("marks" if options.answer == "marks" else "answer")
    right = right_option(options.answer, named, texts, options.first)
    present = [number for number, text in enumerate(texts) if text]
    if right not in present:
        raise RejectedError("an empty question or answer")
    return ParsedQuestion(question, texts[right], tuple(texts[number] for number in present), present.index(right))


def _clean(options: VideoQaOptions, value: Any) -> str:
    """Apply `options.replace` to a text; remove a match of `options.drop` at its start, and capitalise the rest."""
    text = text_of(value)
    for old, new in options.replace.items():
        text = text.replace(old, new)
    if options.drop:
        text = re.sub(rf"^(?:{options.drop})", "", text).strip()
        text = text[:1].upper() + text[1:]
    return text


def _with_full_stop(text: str) -> str:
    """Add a full stop to a text that does not end with a mark; an empty text stays empty."""
    return text + "." if text and text[-1] not in ".!?" else text


def _cues(group: Group, start: float, end: float | None) -> Iterator[Cue]:
    """Yield the lines of the field `subtitles` within the clip, or its whole text if it has no times."""
    subtitles = group.get("subtitles")
    if isinstance(subtitles, str):
        lines = (" ".join(line.split()) for line in subtitles.replace("<subtitle>", " ").splitlines())
        if text := "\n".join(filter(None, lines)):
            yield Cue(text=text)
        return
    for line in subtitles or ():
        first, last, text = float(line["start"]), float(line["end"]), text_of(line["text"])
        if text and last > start and (end is None or first < end):
            yield Cue(text=text, start=max(first - start, 0.0), end=last - start)
