"""Rows of the catalog molmo2-eval, from files in their published layout to scored answers."""

from pathlib import Path

import published_images
import published_videos
import pytest

from molmo2.eval.benchmarks import SUITES
from shards.asked import asked_bytes, read_asked
from shards.catalog import load_catalog
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Annotation, Example

ROWS = {row.name: row for row in load_catalog("molmo2-eval").rows}
BENCHMARKS = {each.dataset: each for suite in SUITES.values() for each in suite.benchmarks if each.dataset in ROWS}
CASES = published_images.CASES | published_videos.CASES


def annotations(name: str, raw: Path) -> list[Annotation]:
    """What is asked of a dataset, as the builder gets it."""
    row, folder = ROWS[name], raw / ROWS[name].folder
    table = open_rows(row, "eval", folder)
    groups = read_groups(row, "eval", folder, table, table.groups(row.group_by))
    made = [example for group in groups for example in convert(group)]
    return [one for example in made if isinstance(example, Example) for one in example.annotations]


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_files_become_scored_questions(name: str, tmp_path: Path) -> None:
    make, answers = CASES[name]
    make(tmp_path / ROWS[name].folder)
    asked = annotations(name, tmp_path)
    assert len(asked) == len(answers)
    assert read_asked(asked_bytes(asked)) == tuple(asked)  # as the shards keep it
    for one, (answer, score) in zip(asked, answers, strict=True):
        assert BENCHMARKS[name].metric(answer, one, one.facts).value == pytest.approx(score)


def test_every_row_has_a_case_and_a_benchmark() -> None:
    assert set(ROWS) == set(CASES) == set(BENCHMARKS)
