"""Questions about one video: multiple choice, open, or both, given as texts, indices or marks; conversations.

A field may be a value or a list, as in `shards.convert.image_questions`. Rows of one group that name other clips of the
video become other examples. Times in the rows are those of the whole video, those of an example count from its clip.
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
Asked = tuple[str, str, tuple[str, ...], int | None]  # question, answer, options, the right one's place

_NUMBER = r"\d+(?:\.\d+)?"
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_SPAN = re.compile(rf"\s*\[?\s*({_NUMBER})\s*[-:]\s*({_NUMBER})\s*\]?\s*")
_EMBEDDED = re.compile(r"(?P<question>.*)\n\s*The Options are:\s*(?P<options>\[.*\])\s*", re.DOTALL | re.IGNORECASE)


def video_qa(group: Group) -> Iterator[Example | Omitted]:
    """Questions in the forms that `options.ask` lists: "choice", "open"; stage "eval" asks openly alone if it can.

    Options are the field `options`, the fields `option_0`, `option_1`, ..., or the `answer` among the `negatives`
    (and `options.also`) in a drawn order; with `options.embedded` the last lines of the question, of which
    `options.cut` is taken out first. `options.answer` says how an answer is given where there are options: as "index"
    (default; `options.first` is that of the first option), "letter" or "text", or as "marks", one for each option.
    Blank options are left out. A question without options is asked openly, in `options.open_style`.
    `options.max_per_example` bounds the tree. Without a field `question` it is drawn from the field `question_pool` or
    from `options.questions`, where "{label}" stands for the field `label`, and "{label_lower}" for it in small letters.
    A field `style` goes before `open_style`. The field `windows`, a list of [start, end] in seconds, is an answer too.
    Where there is no field `question`, an answer that a clip has already is left out. `options.full_stop` ends answers.
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
                asked = _asked(group, values, f"{group.row.name}/{group.key}/{index}/{number}")
            except RejectedError as error:
                yield group.omit(str(error), index)
                left_out += 1
                continue
            once = (clip, text_of(values.get("label")), asked[1])
            if "question" not in group.row.columns and once in seen:
                yield group.omit(f"the same answer twice for one clip: {asked[1]!r}", index)
                continue
            seen.add(once)
            style = text_of(values.get("style")) or str(group.row.options.get("open_style", ""))
            clips.setdefault(clip, []).extend(_annotations(group, asked, style))
    if clips or not left_out:  # else every reason is told already
        yield from examples_of(group, clips)


def video_spans(group: Group) -> Iterator[Example | Omitted]:
    """A whole video whose parts have captions, in `options.style`; `options.questions` name a part's times."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (span, text) in enumerate(group.aligned(index, "spans", "text")):
            start, end = map(float, span)
            if not start < end or not text_of(text):
                yield group.omit(f"a part from {start} to {end} s, or one without text", index)
                continue
            draw = rng_of(f"{group.row.name}/{group.key}/{index}/{number}", "question")
            questions = group.option("questions")
            asked = questions[int(draw.integers(len(questions)))].format(start=f"{start:.1f}", end=f"{end:.1f}")
            said = _ended(group, text_of(text))
            annotations.append(Text(style=str(group.option("style")), question=asked, answer=said))
    yield from examples_of(group, {(None, None): annotations})


def video_conversation(group: Group) -> Iterator[Example | Omitted]:
    """Turns of a "human" and a model, each pair a question of its own in `options.style`; options stand in its text."""
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
    """Multiple choice whose question ends with the line "The Options are: [...]"; the answer counts from 1."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        found = _EMBEDDED.fullmatch(group.text("question", index))
        options = ast.literal_eval(found["options"]) if found else []
        answer = int(group.text("answer", index)) - 1
        if not found or not 0 <= answer < len(options):
            yield group.omit(f"no options in the question, or answer {answer + 1} of {len(options)}", index)
            continue
        texts = tuple(text_of(option) for option in options)
        question = re.sub(r"\bThe Question is:\s*", "", found["question"], flags=re.IGNORECASE).strip()
        annotations.append(Choice(style="video_multiple_choice", question=question, options=texts, answer=answer))
    yield from examples_of(group, {(None, None): annotations})


def examples_of(group: Group, clips: dict[Clip, list[Annotation]]) -> Iterator[Example]:
    """An example for each clip, or several where the tree has more than `options.max_per_example` annotations.

    With `options.image_fps` a video is a folder of images.

    Raises:
        RejectedError: no annotation at all.
    """
    at_least_one([annotation for found in clips.values() for annotation in found], "no question with an answer")
    most = int(group.row.options.get("max_per_example", 0))
    runs = [
        (clip, number, found[first : first + (most or len(found))])
        for number, (clip, found) in enumerate(clips.items())
        for first in range(0, len(found), most or len(found) or 1)
    ]
    for place, ((start, end), number, run) in enumerate(runs):
        fps = group.row.options.get("image_fps")
        video = group.media.video(group.text("video"), start, end, group.values[0], fps)
        suffix = f"-{number}-{place}" if len(runs) > 1 else ""
        yield group.example(run, video=video, subtitles=list(_cues(group, start or 0.0, end)), suffix=suffix)


def _clip(group: Group, index: int) -> Clip:
    """The times of a row's clip: fields `start` and `end`, or both in `span`: [3.5, 7], "3.5-7" or "[3.5:7]"."""
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
    """Seconds, given so or as HH:MM:SS.mmm."""
    if value in (None, ""):
        return None
    clock = _CLOCK.fullmatch(str(value))
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else float(value)


def _questions(group: Group, index: int) -> Iterator[dict[str, Any]]:
    """Field values question by question; "pool" are questions to draw from where there is no column for one."""
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


def _asked(group: Group, values: dict[str, Any], draw: str) -> Asked:
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
        answer = _ended(group, _clean(group, most_common(values.get("answer"), draw)))
    if not question or not answer:
        raise RejectedError("an empty question or answer")
    if place is None and "open_style" not in group.row.options and not values.get("style"):
        raise RejectedError("no options to choose from")
    if place is None:
        return question, answer, (), None
    kept = [number for number, option in enumerate(options) if option]
    return question, answer, tuple(options[number] for number in kept), kept.index(place)


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
    """The question as it is asked, and its options."""
    if cut := group.row.options.get("cut"):
        question = re.sub(cut, "", question).strip()
    if group.row.options.get("embedded") and options is None:
        return option_lines(question)
    return question, listed(options)


def _clean(group: Group, value: Any) -> str:
    """A text without what `options.drop` matches at its start, and then with a capital letter."""
    text = text_of(value)
    for old, new in group.row.options.get("replace", {}).items():
        text = text.replace(old, new)
    if drop := group.row.options.get("drop"):
        text = re.sub(rf"^(?:{drop})", "", text).strip()
        text = text[:1].upper() + text[1:]
    return text


def _ended(group: Group, text: str) -> str:
    """A text with a full stop, if the row wants one and the text does not end with a mark."""
    return text + "." if group.row.options.get("full_stop") and text and text[-1] not in ".!?" else text


def _annotations(group: Group, asked: Asked, style: str) -> Iterator[Annotation]:
    question, answer, options, place = asked
    forms = group.row.options.get("ask", ("open",))
    if place is not None and "choice" in forms and not (group.stage == "eval" and "open" in forms):
        yield Choice(style="video_multiple_choice", question=question, options=options, answer=place)
    if place is None or "open" in forms:
        yield Text(style=style, question=question, answer=answer)


def _cues(group: Group, start: float, end: float | None) -> Iterator[Cue]:
    """The lines of the field `subtitles` within the clip, or its text where it has no times."""
    said = group.get("subtitles")
    if isinstance(said, str):
        if text := " ".join(said.replace("<subtitle>", " ").split()):
            yield Cue(text=text)
        return
    for line in said or ():
        first, last, text = float(line["start"]), float(line["end"]), text_of(line["text"])
        if text and last > start and (end is None or first < end):
            yield Cue(text=text, start=max(first - start, 0.0), end=last - start)
