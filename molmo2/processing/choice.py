"""Multiple choice: a question with its options, and the answer, as text.

Evaluation and 10 % of training use one fixed form; the rest of training draws the labels and layout of the options and
the form of the answer: the label, the label and the text, or the text. The instruction asks for that form, so that a
prompt has one right answer.
"""

from __future__ import annotations

import numpy as np

from molmo2.processing.contract import templates
from shards.schema import Choice, RejectedError

FIXED_SHARE = 0.1  # probability of the fixed form in training
INLINE_SHARE = 0.1  # probability that the options are in the line of the question
LABELS_SHOWN_SHARE = 0.8  # probability that options have labels
LABEL_ONLY_SHARE = 0.25  # probability that the answer is only a label
INSTRUCTION = "Only return the correct answer option."

_MAX_OPTIONS = 26  # number of letters for labels
_MARKERS = ("{}.", "{})", "({})", "{}:", "[{}]")
_ROMAN = ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


def _roman(number: int) -> str:
    out = ""
    for value, digits in _ROMAN:
        out, number = out + digits * (number // value), number % value
    return out


def _label(kind: int, index: int) -> str:
    return (chr(ord("A") + index), chr(ord("a") + index), str(index + 1), _roman(index + 1))[kind]


def render_choice(choice: Choice, rng: np.random.Generator | None) -> tuple[str, str]:
    """The user's message and the answer. Without `rng` they have the fixed form "A. option", which scoring expects.

    Raises:
        RejectedError: there are more options than letters, or the answer is not one of the options.
    """
    if not 0 <= choice.answer < len(choice.options) <= _MAX_OPTIONS:
        raise RejectedError(f"answer {choice.answer} of {len(choice.options)} options (at most {_MAX_OPTIONS})")
    if not choice.labelled:
        return "\n".join([choice.question, INSTRUCTION, *choice.options]), choice.options[choice.answer]
    if rng is None or rng.random() < FIXED_SHARE:
        lines = [f"{_label(0, i)}. {option}" for i, option in enumerate(choice.options)]
        return "\n".join([choice.question, INSTRUCTION, *lines]), lines[choice.answer]
    kind, marker = int(rng.integers(4)), _MARKERS[rng.integers(len(_MARKERS))]
    labelled, label_only, inline = rng.random(3) < (LABELS_SHOWN_SHARE, LABEL_ONLY_SHARE, INLINE_SHARE)
    blank = not choice.options[choice.answer].strip()  # then only a label can be the answer
    labels = [_label(kind, i) for i in range(len(choice.options))]
    lines = list(choice.options)
    if labelled or blank:
        lines = [f"{marker.format(label)} {line}".strip() for label, line in zip(labels, lines, strict=True)]
    form = "label" if blank or (labelled and label_only) else "option" if labelled else "text"
    answer = labels[choice.answer] if form == "label" else lines[choice.answer]
    instructions = templates()[f"choice_{form}"]
    head = "\n".join([choice.question, instructions[rng.integers(len(instructions))]])
    return (f"{head} {'; '.join(lines)}" if inline else "\n".join([head, *lines])), answer
