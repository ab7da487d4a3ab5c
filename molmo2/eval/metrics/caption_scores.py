"""Metrics of captions: CIDEr and ROUGE-L by pycocoevalcap, and statement F1 with a judge.

Words are split here and not by the PTB tokenizer, which needs Java, so a CIDEr is comparable only with others of this
project. The project has no judge: it is a language model that the user provides.
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
    """The words of a text in lower case, without punctuation, separated by single spaces."""
    return " ".join(_WORD.findall(text.lower()))


def rouge_l(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
    """ROUGE-L: F measure of the longest common subsequence with beta 1.2."""
    from pycocoevalcap.rouge.rouge import Rouge  # extra "eval"

    return Score(float(Rouge().calc_score([words(prediction)], [words(answer) for answer in accepted(asked, row)])))


def cider(answers: Sequence[Answered]) -> float:
    """CIDEr over all answers (0 to 10); n-grams that are rare in the references have more weight."""
    from pycocoevalcap.cider.cider import Cider  # extra "eval"

    references = {i: [words(a) for a in accepted(answer.asked, answer.row)] for i, answer in enumerate(answers)}
    predictions = {i: [words(answer.prediction)] for i, answer in enumerate(answers)}
    return float(Cider().compute_score(references, predictions)[0])


class Judge(Protocol):
    """A language model that judges captions. Its answers must not depend on the order of the calls."""

    def statements(self, caption: str) -> list[str]:
        """The single facts that a caption states."""

    def supported(self, statement: str, caption: str) -> bool:
        """Whether the caption supports the statement."""


def statement_f1(judge: Judge) -> Metric:
    """The statement F1 of a judge, as a metric: the harmonic mean of precision and recall of statements.

    Precision is the fraction of the prediction's statements that the reference caption supports. Recall is the fraction
    of `row["statements"]` that the prediction supports.
    """

    def statement_f1(prediction: str, asked: Annotation, row: Mapping[str, Any]) -> Score:
        (reference,) = accepted(asked, row)
        predicted, expected = judge.statements(prediction), list(row["statements"])
        if not predicted or not expected:
            return Score(float(not predicted and not expected))
        precision = sum(judge.supported(statement, reference) for statement in predicted) / len(predicted)
        recall = sum(judge.supported(statement, prediction) for statement in expected) / len(expected)
        return Score(2 * precision * recall / (precision + recall) if precision + recall else 0.0)

    return statement_f1
