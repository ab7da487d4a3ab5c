"""Metrics of captions: CIDEr and ROUGE-L by pycocoevalcap, and statement F1 with a judge.

Words are split here and not by the PTB tokenizer, which needs Java, so a CIDEr is comparable only with others of this
project. The judge is a language model that the user provides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

from molmo2.eval.metrics.scores import Answered, CorpusMetric, Score
from molmo2.eval.metrics.text_scores import accepted
from shards.schema import Annotation

AT_ONCE: Final = 16  # captions whose statements are judged at the same time
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


class JudgeOfCaptions(Protocol):
    """What judges captions (`molmo2.eval.judge`). Its answers must not depend on the order of the calls."""

    def statements(self, caption: str) -> list[str]:
        """The single facts that a caption states."""

    def supported(self, statements: Sequence[str], caption: str) -> list[bool]:
        """Whether the caption supports each of the statements."""


def statement_f1(judge: JudgeOfCaptions) -> CorpusMetric:
    """The mean statement F1 of all answers, by a judge: the harmonic mean of precision and recall of statements.

    Precision is the fraction of the prediction's statements that the reference caption supports. Recall is the fraction
    of `row["statements"]` that the prediction supports. `AT_ONCE` captions are judged at the same time.
    """

    def score(answer: Answered) -> float:
        (reference,) = accepted(answer.asked, answer.row)
        predicted, expected = judge.statements(answer.prediction), list(answer.row["statements"])
        if not predicted or not expected:
            return float(not predicted and not expected)
        precision = sum(judge.supported(predicted, reference)) / len(predicted)
        recall = sum(judge.supported(expected, answer.prediction)) / len(expected)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def statement_f1(answers: Sequence[Answered]) -> float:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return sum(pool.map(score, answers)) / len(answers)

    return statement_f1
