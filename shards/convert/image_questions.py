"""Converters of questions about images: open, with several annotators' answers, conversations, multiple choice.

A field may be a value or a list: a row with a list of questions has a list of answers (and explanations, options) of
the same length. The questions of all rows of a group are about the images of the first row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shards.catalog.converters import IdentityQaOptions, ImageChatOptions, ImageChoiceOptions, ImageQaOptions
from shards.convert.answer_options import ParsedQuestion, listed, named_images, right_option, split_question
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
from shards.schema import Annotation, Chat, Choice, Example, ImageRef, RejectedError, Text, Turn

COUNTING = re.compile(
    r"\b(how many|count (the|all|every|each|how many|up)|(the|what|total|exact) (number|count) of)\b",
    re.IGNORECASE,
)


def image_qa(group: Group, options: ImageQaOptions) -> Iterator[Example | Omitted]:
    """Convert open questions and their answers.

    If there are several annotators' answers, the most frequent one is used; ties are drawn. An explanation is put
    before its answer, a hint before its question.
    """

    def parse(index: int, question: Any, answer: Any, explanation: Any, rng: np.random.Generator) -> Text:
        text, reason = most_common(answer, rng), text_of(explanation)
        question = _with_count_prefix(options.count_prefixes, _with_hint(group, index, text_of(question)), rng)
        if not question or not text:
            raise RejectedError("an empty question or answer")
        return Text(style=options.style, question=question, answer=f"{reason} Answer: {text}" if reason else text)

    annotations = yield from parse_items(group, parse, "question", "answer", "explanation")
    require_annotations(annotations, "no question with an answer")
    images, scale = images_of(group), _loss_scale(group, options.weights)
    if not options.flat:
        yield group.example(annotations, images=images, loss_scale=scale)
        return
    for number, annotation in enumerate(annotations):
        yield group.example([annotation], images=images, suffix=f"-{number}", loss_scale=scale)


def image_choice(group: Group, options: ImageChoiceOptions) -> Iterator[Example | Omitted]:
    """Convert multiple-choice questions; a question without options is an open one, if `open_style` is set.

    Answer options are a list, a Python list as text, or the lines "A. ..." of a text.
    """

    def parse(index: int, question: Any, given: Any, answer: Any, rng: np.random.Generator) -> Choice | Text:
        question = _with_hint(group, index, text_of(question))
        question, texts = split_question(question, given, options.cut, options.embedded)
        if options.named_images:
            question, *texts = named_images([question, *texts])
        if not question:
            raise RejectedError("an empty question or answer")
        if not texts and options.open_style is not None:
            text = next(iter(map(text_of, listed(answer))), "")  # the first of several right answers
            if not text:
                raise RejectedError("an empty question or answer")
            return Text(style=options.open_style, question=question, answer=text)
        right = right_option(options.answer, answer, texts, options.first)
        if not texts[right]:
            raise RejectedError("the right option is missing")
        present = [number for number, text in enumerate(texts) if text]
        asked = ParsedQuestion(question, texts[right], tuple(texts[n] for n in present), present.index(right))
        return (asked.shuffled(rng) if options.shuffle else asked).as_choice(options.style)

    annotations = yield from parse_items(group, parse, "question", "options", "answer")
    yield group.example(require_annotations(annotations, "no question with a right option"), images=images_of(group))


def image_chat(group: Group, options: ImageChatOptions) -> Iterator[Example | Omitted]:
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
        drawn = []
        for rng in group.generators(str(index)):
            prefixed = [
                _with_count_prefix(options.count_prefixes, text, rng) if role == "user" else text
                for role, text in zip(roles, texts, strict=True)
            ]
            turns = tuple(Turn(role=role, text=text) for role, text in zip(roles, prefixed, strict=True))
            drawn.append(Chat(style=options.style, turns=turns))
        annotations.append(of_variants(drawn))
    yield group.example(require_annotations(annotations, "no conversation"), images=images_of(group))


def identity_qa(group: Group, options: IdentityQaOptions) -> Iterator[Example | Omitted]:
    """Convert one answer and its many questions: an example per question and image, or per question if no image."""
    answer, questions = group.text("answer"), [text_of(q) for q in group.items("questions")]
    images: list[tuple[ImageRef, ...]] = [(group.media.image(value),) for value in group.items("images")] or [()]
    require_annotations([Text(style="", answer=answer)] if answer and questions else [], "no question or no answer")
    for place, question in enumerate(questions):
        for number, seen in enumerate(images):
            annotation = Text(style=options.style, question=question, answer=answer)
            yield group.example([annotation], images=seen, suffix=f"-{place}-{number}")


def images_of(group: Group) -> list[ImageRef]:
    """The images of the first row: the field `image` (one, or a list), or the fields image_1, image_2 and so on."""
    if numbered := group.numbered("image"):
        value = [image for field in numbered if (image := group.get(field)) is not None]
        require_annotations(value, "media: no image in the row")
    else:
        value = group.get("image")
    if not isinstance(value, list):
        return [group.image()]
    return [group.media.image(item, None, group.values[0]) for item in value]


def _with_hint(group: Group, index: int, question: str) -> str:
    hint = group.text("hint", index)
    return f"{hint}\n{question}" if hint and question else question


def _with_count_prefix(prefixes: Sequence[str], question: str, rng: np.random.Generator) -> str:
    if not prefixes or not COUNTING.search(question):
        return question
    return f"{pick(prefixes, rng)} {question}"


def _loss_scale(group: Group, weights: Mapping[str, float] | None) -> float:
    if weights is None:
        return 1.0
    kind = group.text("weight_of")
    if kind not in weights:
        raise RejectedError(f"column {group.row.columns['weight_of']}: no weight for {kind!r}")
    return weights[kind]
