"""Rows of the catalog molmo2-eval, from files in their published layout to scored answers."""

from pathlib import Path

import published_images
import published_points
import published_tracks
import published_videos
import pytest

from molmo2.eval.benchmarks import load_suites
from molmo2.processing.prompts import render_messages
from shards.asked import asked_bytes, read_asked
from shards.catalog import load_catalog
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Annotation, Choice, Example

ROWS = {row.name: row for row in load_catalog("molmo2-eval").rows}
BENCHMARKS = {
    each.dataset: each for suite in load_suites().values() for each in suite.benchmarks if each.dataset in ROWS
}
CASES = published_images.CASES | published_points.CASES | published_tracks.CASES | published_videos.CASES


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
        user, assistant = render_messages(one, "eval", None, video=name in published_tracks.CASES)
        assert user.content and assistant.content and "<image" not in user.content
        assert BENCHMARKS[name].metric(answer, one, one.facts).value == pytest.approx(score)


def test_every_row_has_a_case_and_every_benchmark_a_row() -> None:
    wanted = {each.dataset for name, suite in load_suites().items() if name != "demo" for each in suite.benchmarks}
    assert set(ROWS) == set(CASES) == wanted


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("mmmu", "Which is older, Image 1 or Image 2?"),
        ("real-world-qa", "Where does the car go?"),
        ("muir-bench", "Which differs from Image 1?"),
        ("blink", "Which image is farther?"),
        ("math-vista", "Which is longer?"),
        ("lvbench", "What does he do?"),
        ("temp-compass", "Which one fits?"),
        ("temporal-bench", "Which caption is right?"),
    ],
)
def test_questions_are_asked_without_what_stands_elsewhere(name: str, question: str, tmp_path: Path) -> None:
    make, _ = CASES[name]
    make(tmp_path / ROWS[name].folder)
    first = annotations(name, tmp_path)[0]
    assert isinstance(first, Choice) and first.question == question


def test_a_benchmark_of_counts_is_answered_by_a_number(tmp_path: Path) -> None:
    published_images.pixmo_count(tmp_path / "pixmo-count")
    (asked,) = annotations("pixmo-count", tmp_path)
    assert [message.content for message in render_messages(asked, "eval", None, video=False)] == [
        "How many dogs are there?",
        "5",
    ]


def test_right_answers_of_tracks_are_what_masks_reward(tmp_path: Path) -> None:
    for name, (make, _) in published_tracks.CASES.items():
        make(tmp_path / ROWS[name].folder)
        for one in annotations(name, tmp_path):
            right = render_messages(one, "eval", None, video=True)[1].content
            wanted = 6 / 8 if name == "ref-yt-vos" else 1.0  # there the masks are of one object
            assert BENCHMARKS[name].metric(right, one, one.facts).value == pytest.approx(wanted), name
