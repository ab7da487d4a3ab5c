"""Layouts of published files that could not be seen: a row reads each of the layouts that its notes name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from catalog_cases import catalog, fixtures, write_raw

from shards.catalog import load_catalog
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Example, RejectedError
from shards.sources.media_files import MediaFiles

FIGURES = {"train1": "figureqa-train1-v1"}
TEXT = {"text_vqa/train_images": "text_vqa/train_images/train_images"}
VIDEOS = {"videos2/000002_fd1v.mp4": "videos2/000002.mp4"}


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("figure-qa", FIGURES),
        ("plot-qa", {"questions/qa_pairs_v2.json": "questions/inner/qa_pairs.json"}),
        ("text-vqa", TEXT),
        ("vicas-track", VIDEOS),
        ("vicas-ground", VIDEOS),
        ("vicas-single-point-track", VIDEOS),
    ],
)
def test_another_layout_gives_the_same_examples(name: str, moves: dict[str, str], tmp_path: Path) -> None:
    (row,) = catalog().select("sft", [name])
    write_raw(tmp_path, row)
    first = examples(name, tmp_path)
    for source, target in moves.items():
        shutil.move(tmp_path / row.folder / source, tmp_path / "moved")
        (tmp_path / row.folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "moved", tmp_path / row.folder / target)
    assert first and examples(name, tmp_path) == first


@pytest.mark.parametrize("name", ["uw-cot", "web-uot"])
def test_the_column_holds_an_id_or_its_path(name: str, tmp_path: Path) -> None:
    (row,) = catalog().select("sft", [name])
    write_raw(tmp_path, row)
    path = next((tmp_path / row.media_from[0]).rglob("*.mp4"))
    media = MediaFiles(root=tmp_path / row.folder, templates=row.media, others=(tmp_path / row.media_from[0],))
    (published,) = (
        r["video"] for r in fixtures()[row.folder][row.files["train"].replace("*", "00000-of-00001")]["rows"]
    )
    assert published == "seq-1/seq-1"
    for value in ("seq-1", published):
        assert media.video(value).path == str(path)


def examples(name: str, raw: Path) -> list[tuple[Any, ...]]:
    """The annotations of all examples of a row; their media must exist."""
    (row,) = catalog().select("sft", [name])
    table = open_rows(row, "sft", raw / row.folder)
    results = []
    for group in read_groups(row, "sft", raw / row.folder, table, table.groups(row.group_by)):
        results += [result for result in convert(group) if isinstance(result, Example)]
    return [(example.key, example.annotations) for example in results]


def test_a_star_in_the_name_of_a_file(tmp_path: Path) -> None:
    for name in ("a/1_x.mp4", "a/10_x.mp4", "b/2_x.mp4", "b/2_y.mp4", "b/3_.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    media = MediaFiles(root=tmp_path, templates=("*/{value}_*.mp4",))
    assert media.video("1").path == str(tmp_path / "a/1_x.mp4")
    assert media.video("3").path == str(tmp_path / "b/3_.mp4")
    with pytest.raises(RejectedError, match=r"fits several files: .*2_x.mp4, .*2_y.mp4"):
        media.video("2")
    for absent in ("4", "*"):
        with pytest.raises(RejectedError, match=r"^media: .* does not exist"):
            media.video(absent)
    inside = MediaFiles(root=tmp_path / "b", templates=("{value}_*.mp4",), others=(tmp_path / "b",))
    with pytest.raises(RejectedError, match="lies outside"):
        inside.video("../a/1")
    whole = MediaFiles(root=tmp_path, templates=("{value}_*.mp4",))
    assert whole.video("a/1").path == str(tmp_path / "a/1_x.mp4")


def test_every_row_says_its_licence() -> None:
    for name in ("molmo2", "molmo2-eval"):
        loaded = load_catalog(name)
        silent = [
            row.name for row in loaded.rows if not row.source.get("licence") and "licence" not in " ".join(row.notes)
        ]
        assert not silent, name


def test_no_archive_is_unpacked_that_is_not_published() -> None:
    """The publisher has no videos of the Perception Test that are longer than a minute."""
    patterns = catalog().folders["llava-video-academic"].download.extract
    assert len(patterns) == 10 and not [p for p in patterns if p.startswith(("1_2_m_p", "2_3_m_p"))]


def test_the_official_rules_stand_in_the_rows() -> None:
    rows = {row.name: row for row in catalog().rows}
    assert "Answers count from 0, as in Molmo2's loader." in rows["tgif"].notes
    steps = catalog().how_to_get(rows["molmo2-video-track"])
    assert " MOT20," in steps and "MOT15" not in steps
