"""Rows of the catalog molmo2-eval, from files in their published layout to scored answers."""

from pathlib import Path

import published_images
import published_videos
import pytest

from molmo2.eval.benchmarks import SUITES
from molmo2.eval.runner import questions
from shards.catalog import load_catalog
from shards.schema import Choice, Text

ROWS = {row.name: row for row in load_catalog("molmo2-eval").rows}
BENCHMARKS = {each.dataset: each for suite in SUITES.values() for each in suite.benchmarks if each.dataset in ROWS}
CASES = published_images.CASES | published_videos.CASES


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_files_become_scored_questions(name: str, tmp_path: Path) -> None:
    make, answers = CASES[name]
    make(tmp_path / ROWS[name].folder)
    benchmark = BENCHMARKS[name]
    asked = questions(ROWS[name], tmp_path, benchmark.columns)
    assert len(asked) == len(answers) and all(isinstance(question.asked, Text | Choice) for question in asked)
    for question, (answer, score) in zip(asked, answers, strict=True):
        assert benchmark.metric(answer, question.asked, question.row).value == pytest.approx(score)


def test_every_row_has_a_case_and_a_benchmark() -> None:
    assert set(ROWS) == set(CASES) == set(BENCHMARKS)
