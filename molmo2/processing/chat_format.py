r"""The chat format: it encodes messages as ChatML tokens with loss weights, in the branches of a message tree.

A stored variant is a trunk (BOS, visual placeholders and the text between them) and one branch per annotation. There
are no system turns: a system message is the start of the first question. Texts are encoded without surrounding space:
an answer is tokenized by itself, and must give the same tokens after "assistant\n" in one string. User turns carry no
loss, and every answer ends with `<|im_end|>`, which carries loss too.
`chat_template.jinja` beside this file is the same format for users of an exported model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molmo2.processing.prompts import Message
from molmo2.processing.tokenizer import Tokenizer
from shards.format import TOKEN_DTYPE
from shards.schema import RejectedError


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens of one annotation; `answer` is True for tokens with loss. The last token is the final EOS."""

    messages: tuple[Message, ...]
    ids: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]


def encode_user(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a user turn and of the start of the assistant's turn, after which the model answers."""
    end = [tokenizer.eos, *tokenizer.encode("\n"), tokenizer.turn_start]
    return [tokenizer.turn_start, *tokenizer.encode(f"user\n{text.strip()}"), *end, *tokenizer.encode("assistant\n")]


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> Branch:
    """Encode user and assistant turns in alternation; a conversation may end with the user (a prompt).

    Raises:
        RejectedError: an answer is empty.
    """
    ids: list[int] = []
    answer: list[bool] = []
    for i, message in enumerate(messages):
        if message.role == "user":
            piece = [*(tokenizer.encode("\n") if i else []), *encode_user(tokenizer, message.content)]
        elif answer_text := message.content.strip():
            piece = [*tokenizer.encode(answer_text), tokenizer.eos]
        else:
            raise RejectedError(f"empty answer to {messages[i - 1].content[:80]!r}")
        ids += piece
        answer += [message.role == "assistant"] * len(piece)
    return Branch(tuple(messages), np.array(ids, np.int32), np.array(answer, np.bool_))


def token_weight(num_loss_tokens: int, num_annotations: int) -> float:
    """Molmo2's loss weight of each token of an annotation: 2 / sqrt(n), divided by sqrt(annotations) in a tree.

    Args:
        num_loss_tokens: tokens with loss in the annotation, including its final EOS.
        num_annotations: annotations in the tree. With two or more, n does not count the final EOS, as in Molmo2.
    """
    if num_annotations < 2:
        return 2 / math.sqrt(num_loss_tokens)
    return 2 / math.sqrt(max(num_loss_tokens - 1, 1)) / math.sqrt(num_annotations)


def assemble(trunk: Sequence[int], branches: Sequence[Branch], flat_weight: float | None) -> npt.NDArray[np.void]:
    """A stored variant, [tokens] of `format.TOKEN_DTYPE`; branch i + 1 is `branches[i]`.

    Args:
        trunk: ids of BOS, placeholders and the text between.
        branches: the encoded annotations.
        flat_weight: weight of every loss token; None for `token_weight`.
    """
    lengths = [len(trunk), *(len(branch.ids) for branch in branches)]
    out = np.zeros(sum(lengths), TOKEN_DTYPE)
    out["id"] = np.concatenate([np.array(trunk, np.int32), *(branch.ids for branch in branches)])
    out["branch"] = np.repeat(np.arange(len(lengths)), lengths)
    start = len(trunk)
    for branch in branches:
        weight = token_weight(int(branch.answer.sum()), len(branches)) if flat_weight is None else flat_weight
        out["weight"][start : start + len(branch.ids)] = np.where(branch.answer, weight, 0)
        start += len(branch.ids)
    return out
