"""Questions: counting in words, embedded options, letters of diagrams, subtitles, clock times, sizes of trees."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from shards.catalog import Row, Stage, load_catalog
from shards.convert.common import Group, Omitted
from shards.convert.reading import convert
from shards.convert.video_questions import clock_time
from shards.media.images import load_image
from shards.schema import Chat, Choice, Example, Source, Text, in_variant
from shards.sources.media_files import MediaFiles


def converted(
    root: Path, converter: str, rows: list[dict[str, Any]], options: dict[str, Any], stage: Stage = "sft"
) -> list[Example | Omitted]:
    row = Row(
        name="mine",
        stages=(stage,),
        files={"validation" if stage == "eval" else "train": "*"},
        converter=converter,
        columns={name: name for name in rows[0]},
        options=options,
    )
    group = Group(
        row=row,
        stage=stage,
        media=MediaFiles(root=root),
        key="mine-0",
        sources=tuple(Source(file="f", row=number) for number in range(len(rows))),
        values=tuple(rows),
        num_variants=32,
    )
    (root / "v.mp4").touch()
    return list(convert(group))


def examples(*arguments: Any, **options: Any) -> list[Example]:
    return [item for item in converted(*arguments, **options) if isinstance(item, Example)]


@pytest.mark.parametrize(
    ("question", "counting"),
    [
        ("How many are red?", True),
        ("Look at the shelf. How many books does it hold?", True),
        ("In this picture, what is the number of doors?", True),
        ("Please count all the windows.", True),
        ("Can you tell me the total number of legs?", True),
        ("What is the phone number of the shop?", False),
        ("Which country is this?", False),
        ("How much does it cost on account the back?", False),
    ],
)
def test_counting_questions_are_found_anywhere(tmp_path: Path, question: str, counting: bool) -> None:
    row, options = {"image": {"bytes": b"x"}, "question": question, "answer": "2"}, {"count_prefixes": ["In words:"]}
    for converter in ("image_qa", "image_chat"):
        (example,) = examples(tmp_path, converter, [row], {**options, "style": "user_qa"})
        (annotation,) = example.annotations
        asked = annotation.turns[0].text if isinstance(annotation, Chat) else getattr(annotation, "question", "")
        assert asked == ("In words: " if counting else "") + question


def test_marks_are_removed_in_every_text_variant(tmp_path: Path) -> None:
    row = {"image": {"bytes": b"x"}, "question": "<image>\nWhat?", "answer": ["a", "b"]}
    (example,) = examples(tmp_path, "image_qa", [row], {"style": "vqa2"})
    variants = [in_variant(example.annotations[0], variant) for variant in range(32)]
    found = {(text.question, text.answer) for text in variants if isinstance(text, Text)}
    assert found == {("What?", "a"), ("What?", "b")}


def test_embedded_options_lose_their_names_and_a_bad_answer_costs_one_question(tmp_path: Path) -> None:
    asked = "The Question is: Why?\n The Options are: ['Option 1: It glows.', 'Options 2. It stops.']"
    broken = "Why?\nThe Options are: [1 +]"
    rows = {"video": "v.mp4", "question": [asked, asked, broken, asked], "answer": ["2", "x", "1", "3"]}
    *left_out, example = converted(tmp_path, "video_embedded_choice", [rows], {})
    reasons = [item.reason for item in left_out if isinstance(item, Omitted)]
    assert len(reasons) == len(left_out) == 3 and reasons[1].startswith("item 2 cannot be used: SyntaxError")
    assert isinstance(example, Example)
    (choice,) = example.annotations
    assert isinstance(choice, Choice)
    assert (choice.question, choice.options, choice.answer) == ("Why?", ("It glows.", "It stops."), 1)


@pytest.mark.parametrize(
    ("options", "written", "about_letters"),
    [
        (["a", "b", "none"], ("A", "B", "none"), True),
        (["B", "a", "b"], ("B", "A"), True),
        (["x", "y", "a"], ("x", "y", "a"), False),  # single characters that are on no text of the diagram
        (["root", "leaf"], ("root", "leaf"), False),
    ],
)
def test_letters_of_a_diagram(
    tmp_path: Path, options: list[str], written: tuple[str, ...], about_letters: bool
) -> None:
    PIL.Image.new("RGB", (60, 40), "white").save(tmp_path / "1.png")
    boxes = {"T0": {"rectangle": [[5, 5], [25, 20]], "replacementText": "a"}}
    boxes["T1"] = {"rectangle": [[30, 5], [50, 20]], "replacementText": "b"}
    (tmp_path / "1.png.json").write_text(json.dumps({"text": boxes}))
    row = {"image": "1.png", "question": "Which?", "options": options, "answer": 0, "letters": True}
    opaque, transparent = examples(tmp_path, "diagram_choice", [row], {"annotations": "{value}.json"})
    (choice,) = opaque.annotations
    assert isinstance(choice, Choice) and choice.options == written and choice.labelled != about_letters
    assert choice.style == ("ai2_diagram_no_letter" if about_letters else "ai2_diagram")
    for example, corner in ((opaque, [0, 255, 255]), (transparent, [255, 255, 255])):
        assert load_image(example.images[0])[7, 7].tolist() == corner, "an opaque box is filled with cyan"
    assert np.any(load_image(opaque.images[0]) != np.asarray(PIL.Image.open(io.BytesIO(transparent.images[0].data))))


def test_a_question_without_a_mark_gets_one(tmp_path: Path) -> None:
    options = {"open_style": "s", "question_mark": True}
    for given, asked in [("is it outdoors", "is it outdoors?"), ("Name it.", "Name it."), ("Why?", "Why?")]:
        (example,) = examples(tmp_path, "video_qa", [{"video": "v.mp4", "question": given, "answer": "a"}], options)
        assert example.annotations == (Text(style="s", question=asked, answer="a"),)


@pytest.mark.parametrize(
    ("subtitles", "cues"),
    [
        ("<subtitle> Hello  there.\n\n<subtitle> Bye.", ["Hello there.\nBye."]),
        ("", []),
        (None, []),
        ([{"start": 1, "end": 2, "text": "one\ntwo"}], ["one\ntwo"]),
    ],
)
def test_subtitles_keep_their_lines_and_may_be_empty(tmp_path: Path, subtitles: Any, cues: list[str]) -> None:
    row = {"video": "v.mp4", "question": "Why?", "answer": "a", "subtitles": subtitles}
    (example,) = examples(tmp_path, "video_qa", [row], {"open_style": "s"})
    assert example.subtitles is not None and [cue.text for cue in example.subtitles] == cues
    del row["subtitles"]
    (example,) = examples(tmp_path, "video_qa", [row], {"open_style": "s"})
    assert example.subtitles is None


@pytest.mark.parametrize(("number", "sizes"), [(3, [3]), (4, [4]), (5, [2, 3]), (11, [3, 4, 4])])
def test_trees_of_a_clip_are_about_equally_large(tmp_path: Path, number: int, sizes: list[int]) -> None:
    row = {"video": "v.mp4", "question": [f"q{i}" for i in range(number)], "answer": [f"a{i}" for i in range(number)]}
    found = examples(tmp_path, "video_qa", [row], {"open_style": "s", "max_per_example": 4})
    assert [len(example.annotations) for example in found] == sizes
    asked = [a.question for example in found for a in example.annotations if isinstance(a, Text)]
    assert asked == row["question"]


def test_an_answer_that_is_no_option_is_asked_openly(tmp_path: Path) -> None:
    row = {"video": "v.mp4", "question": "Which?", "answer": "door", "options": ["shoe", "towel"]}
    (example,) = examples(tmp_path, "video_qa", [row], {"ask": ["choice", "open"], "answer": "text", "open_style": "s"})
    assert example.annotations == (Text(style="s", question="Which?", answer="door"),)
    (omitted,) = converted(tmp_path, "video_qa", [row], {"ask": ["choice"], "answer": "text", "open_style": "s"})
    assert isinstance(omitted, Omitted) and "'door' is none of 2 options" in omitted.reason


def test_half_of_the_questions_about_times_have_clock_times(tmp_path: Path) -> None:
    row = {"video": "v.mp4", "spans": [[75.25, 3725.96]], "text": ["a"]}
    options = {"style": "part", "questions": ["from {start} to {end}"]}
    (example,) = examples(tmp_path, "video_spans", [row], options)
    asked = [in_variant(example.annotations[0], variant) for variant in range(32)]
    questions = [annotation.question for annotation in asked if isinstance(annotation, Text)]
    clock = questions.count("from 00:01:15.2 to 01:02:06.0")
    assert 8 < clock < 24 and questions.count("from 75.2 to 3726.0") == 32 - clock
    (example,) = examples(tmp_path, "video_spans", [row], options, stage="eval")
    assert example.annotations[0] == Text(style="part", question="from 75.2 to 3726.0", answer="a")
    assert clock_time(59.96) == "00:01:00.0"


@pytest.mark.parametrize("name", ["demo", "molmo2"])
def test_no_row_assumes_that_a_label_is_singular(name: str) -> None:
    for row in load_catalog(name).rows:
        assert not re.search(r"\b(an?|one|each|every|is|are) {label", json.dumps(row.options)), row.name
