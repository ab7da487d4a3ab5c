"""Converters of questions about images: open, with several annotators' answers, conversations, multiple choice.

A field may be a value or a list: a row with a list of questions has a list of answers (and explanations, options) of
the same length. The questions of all rows of a group are about the images of the first row.
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
    """Convert open questions and their answers, in `options.style`.

    If there are several annotators' answers, the most frequent one is used; ties are drawn. An explanation is put
    before its answer, a hint before its question. `options.weights` maps the field "weight_of" to a loss scale.
    With `options.flat` every question is an example of its own. One of `options.count_prefixes` is put before a
    counting question, to distinguish it from one that is answered with points.
    """
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (question, answer, explanation) in enumerate(
            group.aligned(index, "question", "answer", "explanation")
        ):
            draw = f"{group.row.name}/{group.key}/{index}/{number}"
            answer_text = most_common(answer, draw)
            question_text = _with_count_prefix(group, _with_hint(group, index, text_of(question)), draw)
            if question_text and answer_text:
                reason = text_of(explanation)
                answer_text = f"{reason} Answer: {answer_text}" if reason else answer_text
                annotations.append(Text(style=str(group.option("style")), question=question_text, answer=answer_text))
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
    """Convert multiple-choice questions, in `options.style`.

    Options are a list, a Python list as text, or the lines "A. ..." of a text; with `options.embedded` they are the
    last lines of the question. `options.answer` is the form of the answer: "index" (default), "letter" ("B", "(B) ...")
    or "text" (equal to an option). A question without options is an open one in `options.open_style`. Matches of the
    regular expression `options.cut` are removed from the question first. With `options.named_images` "<image 2>", or
    the second "<image>", becomes "Image 2". `options.shuffle` draws the order of the options.
    """
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        for number, (question, options, answer) in enumerate(group.aligned(index, "question", "options", "answer")):
            try:
                question_text, texts = _choices(group, _with_hint(group, index, text_of(question)), options)
                annotations.append(_choice(group, question_text, texts, answer, f"{index}/{number}"))
            except RejectedError as error:
                yield group.omit(str(error), index)
    yield group.example(at_least_one(annotations, "no question with a right option"), images=images_of(group))


def _choices(group: Group, question: str, given: Any) -> tuple[str, list[str]]:
    """The final texts of a question and its options."""
    texts = [text_of(option) for option in listed(given)]
    if cut := group.row.options.get("cut"):
        question = re.sub(cut, "", question).strip()
    if group.row.options.get("embedded"):
        question, lines = option_lines(question)
        texts = texts or lines
    if group.row.options.get("named_images"):
        question, *texts = named_images([question, *texts])
    return question, texts


def _choice(group: Group, question: str, options: list[str], answer: Any, draw: str) -> Choice | Text:
    if not options and question and "open_style" in group.row.options:
        text = next(iter(map(text_of, listed(answer))), "")  # the first one if several answers are right
        if not text:
            raise RejectedError("an empty answer")
        return Text(style=str(group.option("open_style")), question=question, answer=text)
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
    """Convert conversations given as "[USER] ... [ASSISTANT] ... [USER] ... [ASSISTANT]" and the last answer."""
    annotations: list[Annotation] = []
    for index in range(len(group.values)):
        spoken = re.split(r"\[(USER|ASSISTANT)\]", group.text("question", index))
        roles, texts = [role.lower() for role in spoken[1::2]], [text.strip() for text in spoken[2::2]]
        answer = group.text("answer", index)
        if roles and roles[-1] == "assistant" and not texts[-1]:
            texts[-1] = answer
        else:  # the last marker is missing, or (with a single turn) all markers
            roles, texts = [*(roles or ["user"]), "assistant"], [*(texts or [spoken[0].strip()]), answer]
        alternate = roles == ["user" if place % 2 == 0 else "assistant" for place in range(len(roles))]
        if (spoken[0].strip() and len(spoken) > 1) or not alternate or not all(texts):
            yield group.omit(f"turns that do not alternate, or an empty one: {roles}", index)
            continue
        draw = f"{group.row.name}/{group.key}/{index}"
        turns = tuple(
            Turn(role=role, text=_with_count_prefix(group, text, f"{draw}/{place}") if role == "user" else text)
            for place, (role, text) in enumerate(zip(roles, texts, strict=True))
        )
        annotations.append(Chat(style=str(group.option("style")), turns=turns))
    yield group.example(at_least_one(annotations, "no conversation"), images=images_of(group))


def identity_qa(group: Group) -> Iterator[Example | Omitted]:
    """Convert one answer and its many questions: an example per question and image, or per question if no image."""
    answer, questions = group.text("answer"), [text_of(q) for q in group.items("questions")]
    images: list[tuple[ImageRef, ...]] = [(group.media.image(value),) for value in group.items("images")] or [()]
    at_least_one([Text(style="", answer=answer)] if answer and questions else [], "no question or no answer")
    for place, question in enumerate(questions):
        for number, seen in enumerate(images):
            annotation = Text(style=str(group.option("style")), question=question, answer=answer)
            yield group.example([annotation], images=seen, suffix=f"-{place}-{number}")


def images_of(group: Group) -> list[ImageRef]:
    """The images of the first row: the field `image` (one, or a list), or the fields image_1, image_2 and so on."""
    numbered = sorted((field for field in group.row.columns if re.fullmatch(r"image_\d+", field)), key=_number_of)
    if numbered:
        value = [image for field in numbered if (image := group.get(field)) is not None]
        at_least_one(value, "media: no image in the row")
    else:
        value = group.get("image")
    if not isinstance(value, list):
        return [group.image()]
    return [group.media.image(item, None, group.values[0]) for item in value]


def _number_of(field: str) -> int:
    return int(field.rpartition("_")[2])


def _with_hint(group: Group, index: int, question: str) -> str:
    hint = group.text("hint", index)
    return f"{hint}\n{question}" if hint and question else question


def _with_count_prefix(group: Group, question: str, draw: str) -> str:
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
