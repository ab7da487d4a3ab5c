"""Questions about one image or several: open, with several annotators' answers, of several turns, multiple choice.

A field may be a value or a list: a list of questions in a row has a list of answers (and of explanations, options)
of the same length, and the questions of all rows of a group are asked about the first row's images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shards.convert.answer_options import listed, named_images, option_lines, place_of
from shards.convert.common import Group, Omitted, at_least_one, most_common, rng_of, text_of
from shards.schema import Annotation, Chat, Choice, Example, ImageRef, RejectedError, Text, Turn

COUNTING = re.compile(
    r"\s*(how many|count (the|all|every|each)|what (is the|number|'s the) (number|of))\b", re.IGNORECASE
)


def image_qa(group: Group) -> Iterator[Example | Omitted]:
    """Questions with answers in `options.style`.

    Of several annotators' answers the most frequent one counts, ties are drawn. An explanation comes before its
    answer, a hint before its question. `options.weights` scales the loss by the value of the field "weight_of".
    With `options.flat` every question is an example of its own.
    `options.count_prefixes` are put before questions that count, so that the answer need not be points.
    """
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (question, answer, explanation) in enumerate(
            group.aligned(index, "question", "answer", "explanation")
        ):
            draw = f"{group.row.name}/{group.key}/{index}/{number}"
            said = most_common(answer, draw)
            asked = _asked(group, _hinted(group, index, text_of(question)), draw)
            if asked and said:
                reason = text_of(explanation)
                said = f"{reason} Answer: {said}" if reason else said
                annotations.append(Text(style=str(group.option("style")), question=asked, answer=said))
            else:
                yield group.omit("an empty question or answer", index)
    at_least_one(annotations, "no question with an answer")
    images, scale = images_of(group), _loss_scale(group)
    if not group.row.options.get("flat"):
        yield group.example(annotations, images=images, loss_scale=scale)
        return
    for number, annotation in enumerate(annotations):
        yield group.example([annotation], images=images, suffix=f"-{number}", loss_scale=scale)


def image_choice(group: Group) -> Iterator[Example | Omitted]:
    """Multiple-choice questions in `options.style`.

    Options are a list, a Python list as text, or the lines "A. ..." of a text; with `options.embedded` the last lines
    of the question are. The answer is an index or, as `options.answer` says, a "letter" ("B", "(B) ...") or the "text"
    of an option. A question without options is an open one in `options.open_style`. What `options.cut`, a regular
    expression, matches is taken out of the question first. With `options.named_images` "<image 2>", or the second
    "<image>", is called "Image 2". `options.shuffle` draws the order of the options.
    """
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (question, options, answer) in enumerate(group.aligned(index, "question", "options", "answer")):
            try:
                asked, texts = _choices(group, _hinted(group, index, text_of(question)), options)
                annotations.append(_choice(group, asked, texts, answer, f"{index}/{number}"))
            except RejectedError as error:
                yield group.omit(str(error), index)
    yield group.example(at_least_one(annotations, "no question with a right option"), images=images_of(group))


def _choices(group: Group, question: str, given: Any) -> tuple[str, list[str]]:
    """The question and the options as they are asked."""
    found = [text_of(option) for option in listed(given)]
    if cut := group.row.options.get("cut"):
        question = re.sub(cut, "", question).strip()
    if group.row.options.get("embedded"):
        question, lines = option_lines(question)
        found = found or lines
    if group.row.options.get("named_images"):
        question, *found = named_images([question, *found])
    return question, found


def _choice(group: Group, question: str, options: list[str], answer: Any, draw: str) -> Choice | Text:
    if not options and question and "open_style" in group.row.options:
        said = next(iter(map(text_of, listed(answer))), "")  # of several right answers the first
        if not said:
            raise RejectedError("an empty answer")
        return Text(style=str(group.option("open_style")), question=question, answer=said)
    place = place_of(str(group.row.options.get("answer", "index")), answer, options)
    if not question or place is None:
        raise RejectedError(f"no question, or answer {answer} of {len(options)} options")
    order = list(range(len(options)))
    if group.row.options.get("shuffle"):
        drawn = rng_of(f"{group.row.name}/{group.key}/{draw}", "option")
        order = [int(number) for number in drawn.permutation(len(options))]
    return Choice(
        style=str(group.option("style")),
        question=question,
        options=tuple(options[number] for number in order),
        answer=order.index(place),
    )


def image_chat(group: Group) -> Iterator[Example | Omitted]:
    """Conversations written as "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]" and the last answer."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        spoken = re.split(r"\[(USER|ASSISTANT)\]", group.text("question", index))
        roles, texts = [role.lower() for role in spoken[1::2]], [text.strip() for text in spoken[2::2]]
        answer = group.text("answer", index)
        if roles and roles[-1] == "assistant" and not texts[-1]:
            texts[-1] = answer
        else:  # no marker for the last answer, or (in one turn) none at all
            roles, texts = [*(roles or ["user"]), "assistant"], [*(texts or [spoken[0].strip()]), answer]
        alternate = roles == ["user" if place % 2 == 0 else "assistant" for place in range(len(roles))]
        if (spoken[0].strip() and len(spoken) > 1) or not alternate or not all(texts):
            yield group.omit(f"turns that do not alternate, or an empty one: {roles}", index)
            continue
        draw = f"{group.row.name}/{group.key}/{index}"
        turns = tuple(
            Turn(role=role, text=_asked(group, text, f"{draw}/{place}") if role == "user" else text)
            for place, (role, text) in enumerate(zip(roles, texts, strict=True))
        )
        annotations.append(Chat(style=str(group.option("style")), turns=turns))
    yield group.example(at_least_one(annotations, "no conversation"), images=images_of(group))


def identity_qa(group: Group) -> Iterator[Example | Omitted]:
    """One answer to every way of asking, once with each image or, where there is none, without."""
    answer, questions = group.text("answer"), [text_of(q) for q in group.items("questions")]
    images: list[tuple[ImageRef, ...]] = [(group.media.image(value),) for value in group.items("images")] or [()]
    at_least_one([Text(style="", answer=answer)] if answer and questions else [], "no question or no answer")
    for place, question in enumerate(questions):
        for number, seen in enumerate(images):
            said = Text(style=str(group.option("style")), question=question, answer=answer)
            yield group.example([said], images=seen, suffix=f"-{place}-{number}")


def images_of(group: Group) -> list[ImageRef]:
    """The images of the first row: the field holds one, or a list of them; or the fields image_1, image_2, ... do."""
    numbered = sorted((field for field in group.row.columns if re.fullmatch(r"image_\d+", field)), key=_number_of)
    if numbered:
        value = [found for field in numbered if (found := group.get(field)) is not None]
        at_least_one(value, "media: no image in the row")
    else:
        value = group.get("image")
    if not isinstance(value, list):
        return [group.image()]
    return [group.media.image(item, None, group.values[0]) for item in value]


def _number_of(field: str) -> int:
    return int(field.rpartition("_")[2])


def _hinted(group: Group, index: int, question: str) -> str:
    hint = group.text("hint", index)
    return f"{hint}\n{question}" if hint and question else question


def _asked(group: Group, question: str, draw: str) -> str:
    prefixes = group.row.options.get("count_prefixes")
    if not prefixes or not COUNTING.match(question):
        return question
    return f"{prefixes[int(rng_of(draw, 'count prefix').integers(len(prefixes)))]} {question}"


def _loss_scale(group: Group) -> float:
    weights = group.row.options.get("weights")
    if weights is None:
        return 1.0
    kind = group.text("weight_of")
    if kind not in weights:
        raise RejectedError(f"column {group.row.columns['weight_of']}: no weight for {kind!r}")
    return float(weights[kind])
