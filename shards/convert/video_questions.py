"""Questions about one video: multiple choice, open, or both, given as texts, indices or marks; conversations.

A field may be a value or a list, as in `shards.convert.questions`. Rows of one group that name other clips of the
video become other examples. Times in the rows are those of the whole video, those of an example count from its clip.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from shards.convert.common import Group, Omitted, at_least_one, most_common, rng_of, text_of
from shards.schema import Annotation, Choice, Cue, Example, RejectedError, Text

Clip = tuple[float | None, float | None]
Asked = tuple[str, str, tuple[str, ...], int | None]  # question, answer, options, the right one's place

_NUMBER = r"\d+(?:\.\d+)?"
_SPAN = re.compile(rf"\s*\[?\s*({_NUMBER})\s*[-:]\s*({_NUMBER})\s*\]?\s*")
_EMBEDDED = re.compile(r"(?P<question>.*)\n\s*The Options are:\s*(?P<options>\[.*\])\s*", re.DOTALL | re.IGNORECASE)


def video_qa(group: Group) -> Iterator[Example | Omitted]:
    """Questions in the forms that `options.ask` lists: "choice", "open"; stage "eval" asks openly alone if it can.

    Options are the field `options`, the fields `option_0`, `option_1`, ..., or the `answer` among the `negatives`
    (and `options.also`) in a drawn order. `options.answer` says how an answer is given where there are options: as an
    "index" (default; `options.first` is that of the first option), as "text", or as "marks", one for each option.
    Blank options are left out. A question without options is asked openly, in `options.open_style`.
    `options.max_per_example` bounds the tree. Without a field `question` it is drawn from the field `question_pool` or
    from `options.questions`.
    """
    clips: dict[Clip, list[Annotation]] = {}
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
            clips.setdefault(clip, []).extend(_annotations(group, asked))
    if clips or not left_out:  # else every reason is told already
        yield from examples_of(group, clips)


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
        video = group.media.video(group.text("video"), start, end, group.values[0])
        suffix = f"-{number}-{place}" if len(runs) > 1 else ""
        yield group.example(run, video=video, subtitles=list(_cues(group, start or 0.0, end)), suffix=suffix)


def _clip(group: Group, index: int) -> Clip:
    """The times of a row's clip: fields `start` and `end`, or a text with both, "3.5-7" or "[3.5:7]", in `span`."""
    start: float | None
    end: float | None
    if "span" in group.row.columns:
        span = _SPAN.fullmatch(group.text("span", index))
        if span is None:
            raise RejectedError(f"column {group.row.columns['span']}: no span of time in {group.get('span', index)!r}")
        start, end = float(span[1]), float(span[2])
    else:
        given = group.get("start", index), group.get("end", index)
        start, end = (None if time in (None, "") else float(time) for time in given)
    if start is not None and end is not None and not start < end:
        raise RejectedError(f"a clip from {start} to {end} s")
    return start, end


def _questions(group: Group, index: int) -> Iterator[dict[str, Any]]:
    """Field values question by question; "pool" are questions to draw from where there is no column for one."""
    pool = group.items("question_pool", index) or group.row.options.get("questions", ())
    single = sorted(field for field in group.row.columns if re.fullmatch(r"(option|negative)_\d+", field))
    fields = [f for f in ("question", "answer", "options", "marks", "negatives") if f in group.row.columns]
    for values in group.aligned(index, *fields):
        item = {**dict(zip(fields, values, strict=True)), "pool": pool}
        for kind in ("option", "negative"):
            if columns := [field for field in single if field.startswith(kind)]:
                item[f"{kind}s"] = [group.get(field, index) for field in columns]
        yield item


def _asked(group: Group, values: dict[str, Any], draw: str) -> Asked:
    question, pool, how = text_of(values.get("question")), values["pool"], group.row.options.get("answer", "index")
    if not question and pool:
        question = text_of(pool[int(rng_of(draw, "question").integers(len(pool)))])
    options = [_clean(group, option) for option in values.get("options") or ()]
    place: int | None = None
    if negatives := [text for value in values.get("negatives") or () if (text := _clean(group, value))]:
        answer = _clean(group, values["answer"])
        options = [answer, *(text for text in negatives if text != answer), *group.row.options.get("also", ())]
        order = [int(number) for number in rng_of(draw, "option").permutation(len(options))]
        options, place = [options[number] for number in order], order.index(0)
    elif any(options):
        place = _right(how, options, values, int(group.row.options.get("first", 0)))
        answer = options[place]
    else:
        answer = _clean(group, most_common(values.get("answer"), draw))
    if not question or not answer:
        raise RejectedError("an empty question or answer")
    if place is None and "open_style" not in group.row.options:
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
    answer = text_of(values.get("answer"))
    if how == "text":
        if answer not in options:
            raise RejectedError(f"the answer {answer!r} is none of the options")
        return options.index(answer)
    if not re.fullmatch(r"\d+(\.0)?", answer) or not 0 <= int(float(answer)) - first < len(options):
        raise RejectedError(f"answer {answer!r} of {len(options)} options")
    return int(float(answer)) - first


def _clean(group: Group, value: Any) -> str:
    """A text without what `options.drop` matches at its start, and then with a capital letter."""
    text = text_of(value)
    if drop := group.row.options.get("drop"):
        text = re.sub(rf"^(?:{drop})", "", text).strip()
        text = text[:1].upper() + text[1:]
    return text


def _annotations(group: Group, asked: Asked) -> Iterator[Annotation]:
    question, answer, options, place = asked
    forms = group.row.options.get("ask", ("open",))
    if place is not None and "choice" in forms and not (group.stage == "eval" and "open" in forms):
        yield Choice(style="video_multiple_choice", question=question, options=options, answer=place)
    if place is None or "open" in forms:
        yield Text(style=str(group.option("open_style")), question=question, answer=answer)


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
