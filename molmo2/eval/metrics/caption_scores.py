"""Captions: CIDEr and ROUGE-L by pycocoevalcap, and statement F1 behind the interface of a judge.

No Java: words are split here, not by the PTB tokenizer, so a CIDEr is comparable only with others of this project. No
judge is shipped: it is a language model of the user's choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from molmo2.eval.metrics.scores import Answered, Metric, Score
from molmo2.eval.metrics.text_scores import accepted
from shards.schema import Annotation

_WORD = re.compile(r"\w+(?:'\w+)?")


def words(text: str) -> str:
    """Lower-case words with one space between them, no punctuation."""
    return " ".join(_WORD.findall(text.lower()))


def rouge_l(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """ROUGE-L: F of the longest common subsequence, recall counting 1.2 times."""
    from pycocoevalcap.rouge.rouge import Rouge  # extra "eval"

    return Score(float(Rouge().calc_score([words(prediction)], [words(answer) for answer in accepted(asked, row)])))


def cider(answers: Sequence[Answered]) -> float:
    """CIDEr over all answers (0 to 10): the rarer an n-gram is among the references, the more it counts."""
    from pycocoevalcap.cider.cider import Cider  # extra "eval"

    references = {i: [words(a) for a in accepted(answer.asked, answer.row)] for i, answer in enumerate(answers)}
    said = {i: [words(answer.prediction)] for i, answer in enumerate(answers)}
    return float(Cider().compute_score(references, said)[0])


class Judge(Protocol):
    """A language model that reads. Its answers must not hang on the order of the calls."""

    def statements(self, caption: str) -> list[str]:
        """The single facts that a caption states."""

    def supported(self, statement: str, caption: str) -> bool:
        """Whether the caption says so."""


def statement_f1(judge: Judge) -> Metric:
    """The metric of a judge: harmonic mean of precision and recall of statements.

    Precision: of the prediction's statements, those that the reference caption supports. Recall: of
    `row["statements"]`, those that the prediction supports.
    """

    def statement_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
        (reference,) = accepted(asked, row)
        said, wanted = judge.statements(prediction), list(row["statements"])
        if not said or not wanted:
            return Score(float(not said and not wanted))
        precision = sum(judge.supported(one, reference) for one in said) / len(said)
        recall = sum(judge.supported(one, prediction) for one in wanted) / len(wanted)
        return Score(2 * precision * recall / (precision + recall) if precision + recall else 0.0)

    return statement_f1
