"""One faulty row is one reject with its file and number, whatever exception it causes; the others are built."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from build_cases import QUESTIONS, factory

from shards.build.builder import build_dataset
from shards.catalog import Row, load_catalog
from shards.format import DatasetIndex
from shards.media import images


def built(raw: Path, folder: Path, lines: list[str], **changes: Any) -> tuple[DatasetIndex, list[dict[str, Any]]]:
    """The index and the rejects of questions about images, given as lines of JSON."""
    mine = folder / "mine"
    mine.mkdir(exist_ok=True)
    PIL.Image.new("RGB", (60, 40), "red").save(mine / "1.png")
    (mine / "rows.jsonl").write_text("\n".join(lines))
    row = Row.model_validate(QUESTIONS).model_copy(update=changes)
    settings = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1, "examples_per_shard": 4})
    out = folder / "out"
    made = build_dataset(row, "sft", settings, factory(raw, "sft", 1), raw=mine, out=str(out), reject_budget=2.0)
    assert made.index is not None
    return made.index, [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def qa(**changes: Any) -> str:
    return json.dumps({"image": "1.png", "question": "What colour?", "answer": "Red.", **changes})


def test_a_row_without_any_usable_item_is_recorded_once(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/empty.png").touch()
    lines = [qa(), qa(question=["a", "b"], answer=["", ""]), qa(question=["a", "b"], answer=["", "c"])]
    index, rejects = built(raw, tmp_path, [*lines, qa(image="empty.png")])
    assert (index.totals.samples, index.totals.rejects) == (2, 3)
    assert [(reject["row"], reject["omitted"]) for reject in rejects] == [(1, False), (2, True), (3, False)]
    assert rejects[0]["reason"] == "no question with an answer: an empty question or answer"
    assert rejects[2]["reason"].endswith("empty.png: not a readable image (the file is empty)")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (qa(answer="Red \ud83d"), "column answer: the text cannot be encoded as UTF-8: 'utf-8' codec can't encode"),
        (qa(question="\udc00?"), "column question: the text cannot be encoded as UTF-8"),
        (
            '{"image": "1.png", "question": "a", "question": "b", "answer": "c"}',
            "column question: key 'question' occurs several times",
        ),
        (qa(answer=float("nan")), "no question with an answer"),
        (qa(question={"text": "What?"}), "no question with an answer"),
        (qa(image={"bytes": 3, "path": None}), "media: no image in the row (int)"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_reject(raw: Path, tmp_path: Path, line: str, reason: str) -> None:
    lines = [qa() for _ in range(9)]
    lines[5] = line
    index, rejects = built(raw, tmp_path, lines)
    assert index.totals.samples == 8
    (reject,) = [reject for reject in rejects if not reject["omitted"]]
    assert (reject["file"], reject["row"]) == ("rows.jsonl", 5) and reason in reject["reason"]


def test_a_key_twice_with_one_value_is_used(raw: Path, tmp_path: Path) -> None:
    index, rejects = built(raw, tmp_path, [qa()[:-1] + ', "answer": "Red."}', qa()])
    assert index.totals.samples == 2 and not rejects


def test_a_group_loses_only_its_faulty_rows(raw: Path, tmp_path: Path) -> None:
    lines = [qa(), qa(answer="\ud83d"), qa(answer="Blue."), qa(question=["a", "b"], answer=["c"])]
    index, rejects = built(raw, tmp_path, lines, group_by="image")
    assert (index.totals.samples, index.totals.annotations) == (1, 2)
    assert [(reject["row"], reject["omitted"]) for reject in rejects] == [(3, False), (1, False)]
    assert "expected a list of 2, found 1" in rejects[0]["reason"]


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError, struct.error, SyntaxError, OSError])
@pytest.mark.parametrize(
    "place", ["shards.convert.image_questions.images_of", "molmo2.processing.visuals.load_with_notes"]
)
def test_any_exception_names_its_row(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    calls = iter(range(99))
    whole = images.load_with_notes if place.endswith("load_with_notes") else None

    def faulty(value: Any) -> Any:
        if next(calls) == 3:
            raise error("x" * 5000)
        return whole(value) if whole else [value.image()]

    monkeypatch.setattr(place, faulty)
    index, (reject,) = built(raw, tmp_path, [qa() for _ in range(6)])
    assert index.totals.samples == 5 and (reject["file"], reject["row"]) == ("rows.jsonl", 3)
    assert f": {error.__name__}: xxx" in reject["reason"] and len(reject["reason"]) < 1100


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), MemoryError(), KeyboardInterrupt()])
def test_errors_of_the_machine_end_the_build(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def faulty(_: Any) -> Any:
        raise error

    monkeypatch.setattr("molmo2.processing.visuals.load_with_notes", faulty)
    with pytest.raises((type(error), ValueError)) as caught:
        built(raw, tmp_path, [qa()])
    assert (not (tmp_path / "out" / "rejects.jsonl").exists() and "disk" in str(caught.value)) or not str(error)
