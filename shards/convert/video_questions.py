"""Converters of questions about a video: multiple choice, open, or both; captions of parts; conversations.

A field may be a value or a list, as in `shards.convert.image_questions`. The rows of a group make an example per clip
of the video. Times in the rows are relative to the video, and times of an example to the start of its clip.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from shards.convert.answer_options import listed, option_lines, place_of
from shards.convert.common import Group, Omitted, at_least_one, most_common, rng_of, text_of
from shards.schema import Annotation, Choice, Cue, Example, RejectedError, Text

Clip = tuple[float | None, float | None]
Asked = tuple[str, str, tuple[str, ...], int | None]  # question, answer, options, index of the right option

_NUMBER = r"\d+(?:\.\d+)?"
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_SPAN = re.compile(rf"\s*\[?\s*({_NUMBER})\s*[-:]\s*({_NUMBER})\s*\]?\s*")
_EMBEDDED = re.compile(r"(?P<question>.*)\n\s*The Options are:\s*(?P<options>\[.*\])\s*", re.DOTALL | re.IGNORECASE)


def video_qa(group: Group) -> Iterator[Example | Omitted]:
    """Convert questions in the forms that `options.ask` lists: "choice", "open"; "eval" asks only openly if it can.

    Answer options are the field `options`, the fields `option_0`, `option_1`, ..., or the `answer` and the `negatives`
    (and `options.also`) in a drawn order; with `options.embedded` they are the last lines of the question, from which
    `options.cut` was removed. Blank options are left out. With options, `options.answer` is the form of the answer:
    "index" (default; counted from `options.first`), "letter", "text", or "marks" (one mark per option). A question
    without options is an open one, in the field `style` or else in `options.open_style`. Without options, the field
    `windows`, a list of [start, end] in seconds, may be the answer. `options.max_per_example` limits the annotations of
    an example. Without a field `question`, the question is drawn from the field `question_pool` or `options.questions`,
    in which "{label}" and "{label_lower}" are replaced by the field `label`; a second equal answer for a clip is then
    left out. `options.full_stop` adds a full stop to open answers.
    """
    clips: dict[Clip, list[Annotation]] = {}
    seen: set[tuple[Clip, str, str]] = set()
    left_out = 0
    for index in range(len(group.values)):
        try:
            clip, questions = _clip(group, index), list(_questions(group, index))
        except RejectedError as error:
            yield group.omit(str(error), index)
            left_out += 1
            continue
        for number, values in enumerate(questions):
            try:
                asked = _parse_question(group, values, f"{group.row.name}/{group.key}/{index}/{number}")
            except RejectedError as error:
                yield group.omit(str(error), index)
                left_out += 1
                continue
            identity = (clip, text_of(values.get("label")), asked[1])
            if "question" not in group.row.columns and identity in seen:
                yield group.omit(f"the same answer twice for one clip: {asked[1]!r}", index)
                continue
            seen.add(identity)
            style = text_of(values.get("style")) or str(group.row.options.get("open_style", ""))
            clips.setdefault(clip, []).extend(_annotations(group, asked, style))
    if clips or not left_out:  # otherwise every row was reported as omitted
        yield from examples_of(group, clips)


def video_spans(group: Group) -> Iterator[Example | Omitted]:
    """Convert a video with captions of its parts, in `options.style`; `options.questions` hold {start} and {end}."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (span, text) in enumerate(group.aligned(index, "spans", "text")):
            start, end = map(float, span)
            if not start < end or not text_of(text):
                yield group.omit(f"a part from {start} to {end} s, or one without text", index)
                continue
            draw = rng_of(f"{group.row.name}/{group.key}/{index}/{number}", "question")
            questions = group.option("questions")
            question = questions[int(draw.integers(len(questions)))].format(start=f"{start:.1f}", end=f"{end:.1f}")
            answer = _with_full_stop(group, text_of(text))
            annotations.append(Text(style=str(group.option("style")), question=question, answer=answer))
    yield from examples_of(group, {(None, None): annotations})


def video_conversation(group: Group) -> Iterator[Example | Omitted]:
    """Convert turns of a "human" and a model: each pair is a question in `options.style`, options included."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        turns = group.items("turns", index)
        for human, model in zip(turns[::2], turns[1::2], strict=False):
            question = text_of(human.get("value")).removeprefix("<image>").strip()
            answer = text_of(model.get("value"))
            if (human.get("from"), model.get("from")) != ("human", "gpt") or not question or not answer:
                yield group.omit("turns that do not alternate, or an empty one", index)
                continue
            annotations.append(Text(style=str(group.option("style")), question=question, answer=answer))
    yield from examples_of(group, {(None, None): annotations})


def video_embedded_choice(group: Group) -> Iterator[Example | Omitted]:
    """Convert multiple choice with "The Options are: [...]" at the end of the question; the answer counts from 1."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        match = _EMBEDDED.fullmatch(group.text("question", index))
        options = ast.literal_eval(match["options"]) if match else []
        answer = int(group.text("answer", index)) - 1
        if not match or not 0 <= answer < len(options):
            yield group.omit(f"no options in the question, or answer {answer + 1} of {len(options)}", index)
            continue
        texts = tuple(text_of(option) for option in options)
        question = re.sub(r"\bThe Question is:\s*", "", match["question"], flags=re.IGNORECASE).strip()
        annotations.append(Choice(style="video_multiple_choice", question=question, options=texts, answer=answer))
    yield from examples_of(group, {(None, None): annotations})


def examples_of(group: Group, clips: dict[Clip, list[Annotation]]) -> Iterator[Example]:
    """Make an example per clip, or several if it has more than `options.max_per_example` annotations.

    With `options.image_fps` the video is a folder of images.

    Raises:
        RejectedError: there is no annotation.
    """
    at_least_one([item for annotations in clips.values() for item in annotations], "no question with an answer")
    most = int(group.row.options.get("max_per_example", 0))
    runs = [
        (clip, number, annotations[first : first + (most or len(annotations))])
        for number, (clip, annotations) in enumerate(clips.items())
        for first in range(0, len(annotations), most or len(annotations) or 1)
    ]
    for place, ((start, end), number, run) in enumerate(runs):
        fps = group.row.options.get("image_fps")
        video = group.media.video(group.text("video"), start, end, group.values[0], fps)
        suffix = f"-{number}-{place}" if len(runs) > 1 else ""
        yield group.example(run, video=video, subtitles=list(_cues(group, start or 0.0, end)), suffix=suffix)


def _clip(group: Group, index: int) -> Clip:
    """The clip of a row: fields `start` and `end`, or the field `span`: [3.5, 7], "3.5-7" or "[3.5:7]"."""
    start: float | None
    end: float | None
    if isinstance(given := group.get("span", index), list):
        start, end = map(float, given)
    elif "span" in group.row.columns:
        span = _SPAN.fullmatch(group.text("span", index))
        if span is None:
            raise RejectedError(f"column {group.row.columns['span']}: no span of time in {group.get('span', index)!r}")
        start, end = float(span[1]), float(span[2])
    else:
        start, end = (_seconds(group.get(field, index)) for field in ("start", "end"))
    if start is not None and end is not None and not start < end:
        raise RejectedError(f"a clip from {start} to {end} s")
    return start, end


def _seconds(value: Any) -> float | None:
    """Parse a time, given in seconds or as HH:MM:SS.mmm."""
    if value in (None, ""):
        return None
    clock = _CLOCK.fullmatch(str(value))
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else float(value)


def _questions(group: Group, index: int) -> Iterator[dict[str, Any]]:
    """Yield the field values of each question of a row; "pool" holds the questions to draw from if it has none."""
    pool = group.items("question_pool", index) or group.row.options.get("questions", ())
    single = sorted(field for field in group.row.columns if re.fullmatch(r"(option|negative)_\d+", field))
    known = ("question", "answer", "options", "marks", "negatives", "style", "label")
    fields = [field for field in known if field in group.row.columns]
    for values in group.aligned(index, *fields):
        item = {**dict(zip(fields, values, strict=True)), "pool": pool, "windows": group.items("windows", index)}
        for kind in ("option", "negative"):
            if columns := [field for field in single if field.startswith(kind)]:
                item[f"{kind}s"] = [group.get(field, index) for field in columns]
        yield item


def _parse_question(group: Group, values: dict[str, Any], draw: str) -> Asked:
    question, pool, how = text_of(values.get("question")), values["pool"], group.row.options.get("answer", "index")
    if not question and pool:
        question = text_of(pool[int(rng_of(draw, "question").integers(len(pool)))])
        label = text_of(values.get("label"))
        question = question.replace("{label}", label).replace("{label_lower}", label.lower())
    question, given = _embedded(group, question, values.get("options"))
    options = [_clean(group, option) for option in given]
    place: int | None = None
    if negatives := [text for value in values.get("negatives") or () if (text := _clean(group, value))]:
        answer = _clean(group, values["answer"])
        options = [answer, *(text for text in negatives if text != answer), *group.row.options.get("also", ())]
        order = [int(number) for number in rng_of(draw, "option").permutation(len(options))]
        options, place = [options[number] for number in order], order.index(0)
    elif any(options):
        place = _right(how, options, values, int(group.row.options.get("first", 0)))
        answer = options[place]
    elif windows := values["windows"]:
        answer = "Segments: " + ", ".join(f"[{start:g}-{end:g}]" for start, end in windows)
    else:
        answer = _with_full_stop(group, _clean(group, most_common(values.get("answer"), draw)))
    if not question or not answer:
        raise RejectedError("an empty question or answer")
    if place is None and "open_style" not in group.row.options and not values.get("style"):
        raise RejectedError("no options to choose from")
    if place is None:
        return question, answer, (), None
    present = [number for number, option in enumerate(options) if option]
    return question, answer, tuple(options[number] for number in present), present.index(place)


def _right(how: str, options: list[str], values: dict[str, Any], first: int) -> int:
    if how == "marks":
        marked = [number for number, mark in enumerate(values["marks"]) if mark == "correct"]
        if len(marked) != 1:
            raise RejectedError(f"{len(marked)} right options, wanted one")
        return marked[0]
    place = place_of(how, values.get("answer"), options, first)
    if place is None:
        raise RejectedError(f"the answer {text_of(values.get('answer'))!r} is none of {len(options)} options")
    return place


def _embedded(group: Group, question: str, options: Any) -> tuple[str, list[Any]]:
    """The final text of a question, and its options."""
    if cut := group.row.options.get("cut"):
        question = re.sub(cut, "", question).strip()
    if group.row.options.get("embedded") and options is None:
        return option_lines(question)
    return question, listed(options)


def _clean(group: Group, value: Any) -> str:
    """Apply `options.replace` to a text; remove a match of `options.drop` at its start, and capitalise the rest."""
    text = text_of(value)
    for old, new in group.row.options.get("replace", {}).items():
        text = text.replace(old, new)
    if drop := group.row.options.get("drop"):
        text = re.sub(rf"^(?:{drop})", "", text).strip()
        text = text[:1].upper() + text[1:]
    return text


def _with_full_stop(group: Group, text: str) -> str:
    """Add a full stop to a text if `options.full_stop` is set and the text does not end with a mark."""
    return text + "." if group.row.options.get("full_stop") and text and text[-1] not in ".!?" else text


def _annotations(group: Group, asked: Asked, style: str) -> Iterator[Annotation]:
    question, answer, options, place = asked
    forms = group.row.options.get("ask", ("open",))
    if place is not None and "choice" in forms and not (group.stage == "eval" and "open" in forms):
        yield Choice(style="video_multiple_choice", question=question, options=options, answer=place)
    if place is None or "open" in forms:
        yield Text(style=style, question=question, answer=answer)


def _cues(group: Group, start: float, end: float | None) -> Iterator[Cue]:
    """Yield the lines of the field `subtitles` within the clip, or its whole text if it has no times."""
    subtitles = group.get("subtitles")
    if isinstance(subtitles, str):
        if text := " ".join(subtitles.replace("<subtitle>", " ").split()):
            yield Cue(text=text)
        return
    for line in subtitles or ():
        first, last, text = float(line["start"]), float(line["end"]), text_of(line["text"])
        if text and last > start and (end is None or first < end):
            yield Cue(text=text, start=max(first - start, 0.0), end=last - start)
