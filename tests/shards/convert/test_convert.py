"""Converters: rows in the published layouts become examples; coordinates, filters, grouping, draws."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest

from shards.catalog import CatalogError, Row, Stage, load_catalog
from shards.convert import CONVERTERS
from shards.convert.common import Group, Omitted, packed_points, text_of, to_fractions, xy_pairs
from shards.convert.reading import convert as convert_group
from shards.download.connect import FetchLimits
from shards.schema import Chat, Choice, Example, Points, RejectedError, Source, Text, Tracks, in_variant
from shards.sources.media_files import MediaFiles


def converted(
    root: Path, name: str, rows: list[dict[str, Any]], stage: Stage = "sft", **options: Any
) -> list[Example | Omitted]:
    """What a group of rows becomes under the demo catalog's row, with some of its options replaced."""
    (row,) = load_catalog("demo").select(stage, [name])
    row = row.model_copy(update={"options": {**row.options, **options}})
    sources = tuple(Source(file="train.parquet", row=number) for number in range(len(rows)))
    media = MediaFiles(root=root, templates=row.media)
    group = Group(row=row, stage=stage, media=media, key=f"{name}-1", sources=sources, values=tuple(rows))
    return list(convert_group(group))


def convert(*arguments: Any, **options: Any) -> list[Example]:
    return [item for item in converted(*arguments, **options) if isinstance(item, Example)]


def omitted(*arguments: Any, **options: Any) -> list[tuple[int, str]]:
    """Row and reason of what was left out."""
    return [(o.source.row, o.reason) for o in converted(*arguments, **options) if isinstance(o, Omitted)]


def picture(root: Path, width: int = 60, height: int = 40) -> str:
    PIL.Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(root / "a.png")
    return (root / "a.png").as_uri()


def video(root: Path) -> str:
    (root / "videos").mkdir(exist_ok=True)
    (root / "videos" / "v.mp4").write_bytes(b"")
    return "v"


def test_caption_and_transcripts(tmp_path: Path) -> None:
    row = {"image_url": picture(tmp_path), "caption": " Two digits. ", "transcripts": ["I see", "", "two"]}
    (example,) = convert(tmp_path, "demo-cap", [row], "pretraining")
    styles = [(a.style, a.answer) for a in example.annotations if isinstance(a, Text)]
    assert styles[0] == ("long_caption", "Two digits.")
    assert styles[1:] in ([("transcript", "I see")], [("transcript", "two")])  # one of them, drawn for each variant
    (example,) = convert(tmp_path, "demo-cap", [row], "sft")
    assert [a.style for a in example.annotations] == ["long_caption"]
    assert example.loss_weight is None
    with pytest.raises(RejectedError, match="no caption"):
        convert(tmp_path, "demo-cap", [{**row, "caption": None}], "sft")


@pytest.mark.parametrize(("prompt", "question"), [("Name it.", "Name it."), (None, ""), (" ", "")])
def test_a_caption_has_the_style_of_its_row_and_may_have_a_prompt_of_its_own(
    tmp_path: Path, prompt: str | None, question: str
) -> None:
    """A row of a user's catalog: no transcripts, a short caption."""
    content = {
        "name": "mine",
        "stages": ["sft"],
        "files": {"train": "a.jsonl"},
        "converter": "image_caption",
        "columns": {"image": "picture", "caption": "text", "question": "prompt"},
        "options": {"style": "short_caption"},
    }
    values = {"picture": picture(tmp_path), "text": "A digit.", "prompt": prompt}
    group = Group(
        row=Row.model_validate(content),
        stage="sft",
        media=MediaFiles(root=tmp_path),
        key="mine-1",
        sources=(Source(file="a.jsonl", row=0),),
        values=(values,),
    )
    (example,) = convert_group(group)
    assert isinstance(example, Example)
    assert example.annotations == (Text(style="short_caption", question=question, answer="A digit."),)


@pytest.mark.parametrize(
    ("scale", "given"), [("percent", (25, 50)), ("pixel", (15, 20)), ("unit", (0.25, 0.5)), ("thousand", (250, 500))]
)
def test_four_coordinate_conventions_become_one(tmp_path: Path, scale: str, given: tuple[float, float]) -> None:
    url = picture(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    size = {"percent": (100, 100), "pixel": (60, 40), "unit": (1, 1), "thousand": (1000, 1000)}[scale]
    row = {
        "image_url": url,
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "points": [{"x": given[0], "y": given[1]}, {"x": -0.009 * size[0], "y": 1.009 * size[1]}],
        "label": "digit 3",
    }
    point, count = convert(tmp_path, "demo-points", [row], scale=scale)
    (annotation,) = point.annotations
    assert isinstance(annotation, Points)
    assert annotation.groups[0].points == ((0.25, 0.5), (0.0, 1.0))
    assert [e.annotations[0].style for e in (point, count)] == ["pointing", "point_count"]
    assert point.key != count.key
    assert point.loss_weight == 1.0
    with pytest.raises(RejectedError, match="sha256"):
        convert(tmp_path, "demo-points", [{**row, "image_sha256": "0" * 64}])


@pytest.mark.parametrize(("lower", "label"), [(False, "STOP sign"), (True, "stop sign")])
def test_labels_keep_their_case_unless_a_row_says_otherwise(tmp_path: Path, lower: bool, label: str) -> None:
    row = {"image_url": picture(tmp_path), "image_sha256": None, "label": "STOP sign", "points": [{"x": 1, "y": 1}]}
    for example in convert(tmp_path, "demo-points", [row], lower_labels=lower):
        (annotation,) = example.annotations
        assert isinstance(annotation, Points) and annotation.label == label


def test_labels_are_packed_by_their_points(tmp_path: Path) -> None:
    row = {"image_url": picture(tmp_path), "image_sha256": None, "label": "x"}
    rows = [{**row, "points": [{"x": i, "y": i} for i in range(n)]} for n in (3, 4, 9, 0, 2)]
    examples = convert(tmp_path, "demo-points", rows, max_points=6, styles=["pointing"])
    assert [[a.count for a in e.annotations if isinstance(a, Points)] for e in examples] == [[3], [4, 0, 2]]
    assert omitted(tmp_path, "demo-points", rows, max_points=6) == [(2, "more than 6 points: 9")]
    assert omitted(tmp_path, "demo-points", [{**rows[0], "label": None}]) == [(0, "no label")]
    assert list(packed_points([], 6)) == []


@pytest.mark.parametrize(
    ("points", "number", "expected"),
    [(None, 3.0, "3"), ([], None, None), (None, float("nan"), "null"), (None, 2.5, "2.5"), (None, "many", "'many'")],
)
def test_counts_without_points(tmp_path: Path, points: Any, number: Any, expected: str | None) -> None:
    """A whole number is a count; missing points and a missing number are no count at all."""
    values = {"image": {"bytes": b"x"}, "label": "dog", "points": points, "number": number}
    options = {"scale": "unit", "styles": ["point_count"], "max_points": 60}
    if expected not in {None, "3"}:
        with pytest.raises(RejectedError, match=expected):
            question_of("image_points", values, options)
        return
    (annotation,) = question_of("image_points", values, options)
    assert isinstance(annotation, Points) and str(annotation.count) == (expected or "0")


def test_pixel_points_of_pixmo_count(tmp_path: Path) -> None:
    row = {
        "image_url": picture(tmp_path),
        "image_sha256": None,
        "count": 2,
        "points": {"x": [30, 60], "y": [10, 40]},
        "label": "digits",
    }
    (example,) = convert(tmp_path, "demo-count", [row], "eval")
    (annotation,) = example.annotations
    assert isinstance(annotation, Points)
    assert annotation.groups[0].points == ((0.5, 0.25), (1.0, 1.0))
    assert annotation.style == "point_count"


def test_pixel_points_are_on_the_turned_image(tmp_path: Path) -> None:
    """A photo is stored 60 x 40 and shown 40 x 60; the point (30, 45) is in pixels of what is shown."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    row = {"image_url": (tmp_path / "a.jpg").as_uri(), "points": {"x": [30], "y": [45]}, "label": "dot"}
    (example,) = convert(tmp_path, "demo-count", [row], "eval")
    (annotation,) = example.annotations
    assert isinstance(annotation, Points) and annotation.groups[0].points == ((0.75, 0.75),)


@pytest.mark.parametrize("scale", ["percent", "unit", "thousand", "pixel"])
def test_points_outside_are_rejected(tmp_path: Path, scale: str) -> None:
    width, height = {"percent": (100, 100), "unit": (1, 1), "thousand": (1000, 1000), "pixel": (60, 40)}[scale]

    def points(x: float, y: float) -> Any:
        row = {"image_url": picture(tmp_path), "points": {"x": [x * width], "y": [y * height]}, "label": "dot"}
        (example,) = convert(tmp_path, "demo-count", [row], "eval", scale=scale)
        return example.annotations[0].groups[0].points[0]

    assert points(1.009, -0.009) == (1.0, 0.0) and points(0.5, 0.25) == (0.5, 0.25)
    for x, y in [(1.02, 0.5), (0.5, 1.02), (-0.02, 0.5), (0.5, -0.02), (float("inf"), 0.5)]:
        with pytest.raises(RejectedError, match=r"points: .* lies outside of .*; correct it, or the row's `scale`"):
            points(x, y)


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (-0.0, "0"), (2.5, "2.5"), (3, "3"), (None, ""), (" a ", "a"), (1e300, "1e+300"), (True, "True")],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_a_value_that_is_no_text_is_rejected(value: Any) -> None:
    with pytest.raises(RejectedError, match="expected text, found"):
        text_of(value)


def test_missing_answers_and_options_are_left_out(tmp_path: Path) -> None:
    """NaN and null count as missing: the commonest of the other answers is used, and empty options are dropped."""
    nan = float("nan")
    row = {"image": {"bytes": b"x"}, "question": "How many?", "answer": [nan, None, 3.0, 3, 2.0]}
    (annotation,) = question_of("image_qa", row, {"style": "user_qa"})
    assert annotation.answer == "3"
    row = {"image": {"bytes": b"x"}, "question": "Which?", "options": ["a", None, "b", nan], "answer": 2}
    (annotation,) = question_of("image_choice", row, {"style": "a_okvqa_mc", "answer": "index"})
    assert annotation.options == ("a", "b") and annotation.answer == 1
    with pytest.raises(RejectedError, match="no question with a right option"):
        question_of("image_choice", {**row, "answer": 1}, {"style": "a_okvqa_mc", "answer": "index"})


def test_marks_in_questions(tmp_path: Path) -> None:
    def asked(question: str, *images: Any) -> str:
        row = {"image": list(images), "question": question, "answer": "Red."}
        (annotation,) = question_of("image_qa", row, {"style": "user_qa"})
        return annotation.question

    one = {"bytes": b"x"}
    assert asked("<image>\nWhat colour?", one) == "What colour?"
    assert asked("<image> <image> Which differs from <image>?", one, one, one) == "Which differs from Image 3?"
    assert asked("Is <image 2> red?", one, one) == "Is Image 2 red?"
    for question in ("<image>\n<image>", "<video>\nWhat?", "<image>", "<image 2>?"):
        with pytest.raises(RejectedError):
            asked(question, one)


def question_of(
    converter: str, values: dict[str, Any], options: dict[str, Any], stage: Stage = "sft", num_variants: int = 1
) -> Any:
    row = Row(
        name="mine",
        stages=(stage,),
        files={"validation" if stage == "eval" else "train": "*"},
        converter=converter,
        columns={name: name for name in values},
        options=options,
    )
    source, media = Source(file="f", row=0), MediaFiles(root=Path("."))
    group = Group(
        row=row,
        stage=stage,
        media=media,
        key="mine-0",
        sources=(source,),
        values=(values,),
        num_variants=num_variants,
    )
    return next(item for item in convert_group(group) if isinstance(item, Example)).annotations


def test_questions_on_one_and_several_images(tmp_path: Path) -> None:
    picture(tmp_path)
    embedded = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    pairs = {"question": ["Which?", "Empty?"], "answer": ["3", " "]}
    (one,) = convert(tmp_path, "demo-image-qa", [{"image": embedded, "qa_pairs": pairs}])
    assert one.annotations == (Text(style="user_qa", question="Which?", answer="3"),)
    assert omitted(tmp_path, "demo-image-qa", [{"image": embedded, "qa_pairs": pairs}])[0][1].startswith("an empty")
    assert one.images[0].data == embedded["bytes"]
    urls = [picture(tmp_path)] * 2
    (several,) = convert(tmp_path, "demo-multi-image-qa", [{"image_urls": urls, "qa_pairs": pairs}])
    assert len(several.images) == 2
    with pytest.raises(RejectedError, match=r"qa_pairs.answer: expected a list of 2, found 1"):
        bad = {"question": ["a", "b"], "answer": ["c"]}
        convert(tmp_path, "demo-image-qa", [{"image": embedded, "qa_pairs": bad}])


IMAGE: dict[str, Any] = {"image": {"bytes": b"x"}}
VIDEO: dict[str, Any] = {"video": "v.mp4"}
COUNT: dict[str, Any] = {"style": "user_qa", "count_prefixes": ["In words:", "No points."]}
DRAWN = {
    "transcript": ("image_caption", {**IMAGE, "transcripts": ["a", "b"]}, {"transcript_stages": ["sft", "eval"]}),
    "most frequent answer": ("image_qa", {**IMAGE, "question": "q", "answer": ["a", "b"]}, {"style": "vqa2"}),
    "count prefix": ("image_qa", {**IMAGE, "question": "How many?", "answer": "2"}, COUNT),
    "count prefix of a conversation": ("image_chat", {**IMAGE, "question": "How many?", "answer": "2"}, COUNT),
    "order": (
        "image_choice",
        {**IMAGE, "question": "q", "options": ["a", "b"], "answer": 1},
        {"style": "mc", "shuffle": True},
    ),
    "label and images": (
        "multi_image_points",
        {"image": [{"bytes": b"x"}] * 2, "labels": ["a", "b"], "points": [[{"x": 4, "y": 2}], []]},
        {"scale": "percent", "styles": ["p", "c"], "max_points": 9, "ask_some": {"p": ["{images}"], "c": ["{images}"]}},
    ),
    "style of points": (
        "video_points",
        {**VIDEO, "label": "a", "times": [0], "points": [[{"x": 4, "y": 2}]]},
        {"styles": ["video_point", "video_point_count"], "max_points": 9},
    ),
    "place of the answer": (
        "video_qa",
        {**VIDEO, "question": "q", "answer": "a", "negatives": ["b", "c"]},
        {"ask": ["choice"]},
    ),
    "question": ("video_qa", {**VIDEO, "answer": "a"}, {"open_style": "label", "questions": ["What?", "Which?"]}),
    "question about a part": (
        "video_spans",
        {**VIDEO, "spans": [[0, 1]], "text": ["a"]},
        {"style": "part", "questions": ["{start}", "{end}"]},
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_draw_is_made_for_each_text_variant(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("v.mp4").touch()
    converter, values, options = DRAWN[name]
    (few,) = question_of(converter, values, options, num_variants=8)
    (many,) = question_of(converter, values, options, num_variants=12)
    assert len(set(map(str, few.other_variants))) > 1
    assert few.other_variants == many.other_variants[:7] and in_variant(few, 0) == few  # as many as there are variants
    assert in_variant(few, 3) == few.other_variants[2]
    (evaluated,) = question_of(converter, values, options, "eval", num_variants=8)
    assert not evaluated.other_variants


def test_labels_with_one_normalized_name_are_one(tmp_path: Path) -> None:
    """The question has one of the written labels, and images in the order in which they were drawn."""
    values = {
        "image": [{"bytes": b"x"}] * 3,
        "labels": ["A Cat", "dog", "cats"],
        "normalized": ["cat", "dog", "cat"],
        "points": [[{"x": 50, "y": 25}], [{"x": 1, "y": 2}], [{"x": 9, "y": 9}, {"x": 5, "y": 5}]],
    }
    options = {"scale": "percent", "styles": ["p"], "max_points": 9, "ask_some": {"p": ["{label}: {images}"]}}
    (first,) = question_of("multi_image_points", values, options, num_variants=60)
    drawn = [in_variant(first, number) for number in range(60)]
    assert {points.label for points in drawn} == {"A Cat", "dog", "cats"}
    everywhere = [points for points in drawn if not points.question]
    assert {points.count for points in everywhere if points.label != "dog"} == {3}
    assert 0.3 < len(everywhere) / len(drawn) < 0.7
    named = [points.question.split(": ")[1].split(", ") for points in drawn if points.question]
    assert any(names != sorted(names) for names in named), "in the order of the draw"
    for points, names in zip([points for points in drawn if points.question], named, strict=True):
        assert {f"image_{group.at}" for group in points.groups} <= set(names)


def test_choices_put_the_answer_at_a_seeded_place(tmp_path: Path) -> None:
    row = {"video_id": video(tmp_path), "Answer": "3", "NegativeAnswers": ["1", "3", "7"]}
    rows = [{**row, "Question": f"Which {i}?"} for i in range(12)]
    (example,) = convert(tmp_path, "demo-video-qa", rows)
    (again,) = convert(tmp_path, "demo-video-qa", rows)
    assert example == again
    places = set()
    assert [a for a in example.annotations if isinstance(a, Text)] == [
        Text(style="video_short_answer", question=row["Question"], answer="3") for row in rows
    ]
    (asked,) = convert(tmp_path, "demo-video-qa", rows[:1], "eval")
    assert [type(annotation) for annotation in asked.annotations] == [Text]
    for annotation in example.annotations:
        if isinstance(annotation, Text):
            continue
        assert isinstance(annotation, Choice)
        assert annotation.options[annotation.answer] == "3"
        assert sorted(annotation.options) == ["1", "3", "7"]
        places.add(annotation.answer)
    assert places == {0, 1, 2}


def test_video_points_are_relative_to_the_clip(tmp_path: Path) -> None:
    row = {
        "video_id": video(tmp_path),
        "question": "How many?",
        "label": "digits",
        "two_fps_timestamps": [12.5, 11.0],
        "points": [[{"x": 50, "y": 25}], []],
        "annotator_unsure": False,
        "clip_start": 10.0,
        "clip_end": 20.0,
    }
    rows = [row, {**row, "annotator_unsure": True}]
    (example,) = convert(tmp_path, "demo-video-point", rows)
    assert omitted(tmp_path, "demo-video-point", rows) == [(1, "the annotator was unsure")]
    (annotation,) = example.annotations
    assert isinstance(annotation, Points)
    assert [(g.at, g.points) for g in annotation.groups] == [(2.5, ((0.5, 0.25),))]
    assert example.video is not None
    assert (example.video.start, example.video.end) == (10.0, 20.0)
    with pytest.raises(RejectedError, match="1 timestamps and 2 frames"):
        convert(tmp_path, "demo-video-point", [{**row, "two_fps_timestamps": [11.0]}])
    assert [e.key[-2:] for e in convert(tmp_path, "demo-video-point", [row, row])] == ["-0", "-1"], "a row an example"
    whole = {**row, "clip_start": None, "clip_end": None}
    (tree,) = convert(tmp_path, "demo-video-point", [whole, {**whole, "label": "letters"}])
    assert [points.label for points in tree.annotations] == ["digits", "letters"]
    assert [group.at for points in tree.annotations for group in points.groups] == [12.5, 12.5]
    between = {**row, "clip_start": 10.2, "clip_end": 20.0}
    assert [g.at for g in convert(tmp_path, "demo-video-point", [between])[0].annotations[0].groups] == [2.0]


@pytest.mark.parametrize(
    ("changes", "clip"),
    [
        ({}, (10.0, 20.0)),
        ({"video_duration": 40.0}, (None, None)),  # short enough to be shown whole
        ({"video_duration": 63.5}, (10.0, 20.0)),
        ({"video_duration": 63.5, "clip_start": None, "clip_end": None}, "63.5 s, at most 63 s"),
        ({"clip_end": 73.5}, "63.5 s, at most 63 s"),
        ({"clip_start": 11.5}, "points from 11 to 12.5 s in a clip from 11.5 s to 20 s"),
        ({"clip_end": 12.0}, "points from 11 to 12.5 s in a clip from 10 s to 12 s"),
        ({"video_duration": 12.0}, "points from 11 to 12.5 s in a clip from 0 s to 12 s"),
        ({"two_fps_timestamps": [], "points": [], "video_duration": 30.0}, (None, None)),
        (
            {"two_fps_timestamps": [], "points": [], "video_duration": 90.0, "clip_start": 0.0, "clip_end": 63.0},
            (0.0, 63.0),
        ),
        (
            {"two_fps_timestamps": [], "points": [], "video_duration": 90.0},
            "no such object, but a clip that is not the beginning of its video",
        ),
        (
            {"two_fps_timestamps": [], "points": [], "video_duration": 90.0, "clip_start": 0.0},
            "no such object, but a clip that is not the beginning of its video",
        ),
    ],
)
def test_clips_of_points(
    tmp_path: Path, changes: dict[str, Any], clip: str | tuple[float | None, float | None]
) -> None:
    row = {
        "video_id": video(tmp_path),
        "label": "digits",
        "two_fps_timestamps": [12.5, 11.0],
        "points": [[{"x": 50, "y": 25}], [{"x": 50, "y": 25}]],
        "clip_start": 10.0,
        "clip_end": 20.0,
    }
    (row_of,) = [row for row in load_catalog("molmo2").rows if row.name == "molmo2-video-point-few"]
    media = MediaFiles(root=tmp_path, templates=("videos/{value}.mp4",))
    source = (Source(file="train.parquet", row=0),)
    group = Group(row=row_of, stage="sft", media=media, key="k", sources=source, values=({**row, **changes},))
    (found,) = convert_group(group)
    if isinstance(found, Omitted):
        assert found.reason == clip and not found.fault
    else:
        assert found.video is not None and (found.video.start, found.video.end) == clip


def test_tracks_leave_out_occluded_objects(tmp_path: Path) -> None:
    points = [{"id": 0, "point": [16, 48], "occluded": False}, {"id": 1, "point": [1, 1], "occluded": True}]
    frames = [{"frame": 15, "time": 0.5, "points": points}, {"frame": 30, "time": 1.0, "points": points[1:]}]
    row = {
        "video": video(tmp_path),
        "expression": "the digit",
        "frame_trajectories": frames,
        "width": 64,
        "height": 64,
        "sampling_fps": 2,
    }
    (example,) = convert(tmp_path, "demo-video-track", [row])
    (tracks,) = example.annotations
    assert isinstance(tracks, Tracks)
    found = [(g.time, g.objects, g.occluded) for g in tracks.groups]
    assert found == [(0.5, ((0, 0.25, 0.75),), (1,)), (1.0, (), (1,))]
    hidden = {**row, "frame_trajectories": frames[1:]}
    assert omitted(tmp_path, "demo-video-track", [hidden]) == [(0, "no object is visible in any frame")]


@pytest.mark.parametrize(("native", "rate"), [(30, 30.0), (29.97, 30.0), (25, 24.0), (10, 12.0), (2, 6.0)])
def test_every_nth_image_of_a_folder_was_annotated(tmp_path: Path, native: float, rate: float) -> None:
    (row,) = load_catalog("molmo2").select("sft", ["burst-track"])
    (tmp_path / "frames" / "train" / "v").mkdir(parents=True)
    point = {"id": 0, "point": [1, 1], "occluded": False}
    values: dict[str, Any] = {"video": "v", "expression": "a", "width": 2, "height": 2, "fps": 6, "sampling_fps": 2}
    values |= {"frame_trajectories": [{"time": 0.5, "points": [point]}], "native": {"value": native}}
    source = (Source(file="train.parquet", row=0),)
    media = MediaFiles(root=tmp_path, templates=row.media)
    group = Group(row=row, stage="sft", media=media, key="k", sources=source, values=(values,))
    (example,) = convert_group(group)
    assert isinstance(example, Example) and example.video is not None
    assert example.video.fps == rate
    values["native"] = None
    with pytest.raises(RejectedError, match=r"no native frame rate of v in native\.value"):
        list(convert_group(group))


def test_captions_below_the_score_are_filtered(tmp_path: Path) -> None:
    row = {"video_id": video(tmp_path), "annotation_score": 4.0, "video_caption": "a", "merged_caption": None}
    row["video_frame_merged_caption"] = "b"
    (example,) = convert(tmp_path, "demo-video-cap", [row], "long")
    assert [a.style for a in example.annotations] == ["video_short_caption", "video_long_caption"]
    low = [{**row, "annotation_score": 2}]
    assert converted(tmp_path, "demo-video-cap", low, "long") == [
        Omitted(source=Source(file="train.parquet", row=0), reason="annotation score below 3: 2")
    ]


def test_chat_filters(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "category": "math",
        "first_message_qwen3_tokens": 5,
        "empty_messages": False,
        "has_special_token": False,
    }
    (example,) = convert(tmp_path, "demo-chat", [row])
    (chat,) = example.annotations
    assert isinstance(chat, Chat)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    for change in ({"category": "code"}, {"first_message_qwen3_tokens": 9999}, {"has_special_token": True}):
        assert convert(tmp_path, "demo-chat", [{**row, **change}]) == []
        assert len(omitted(tmp_path, "demo-chat", [{**row, **change}])) == 1


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("file:///etc/hostname", "lies outside"),
        ("../../etc/hostname", "lies outside"),
        ("ftp://host/a.png", "scheme 'ftp'"),
        ("missing.png", "does not exist"),
        (None, "no image in the row"),
        ("http://127.0.0.1:9/a.png", "private address: http://127.0.0.1:9/a.png"),
    ],
)
def test_media_stay_below_their_folder(tmp_path: Path, value: Any, match: str) -> None:
    with pytest.raises(RejectedError, match=match):
        MediaFiles(root=tmp_path).image(value)


class Handler(http.server.BaseHTTPRequestHandler):
    """/good answers "good", /drip never ends, /cut promises more than it sends, /big sends a megabyte."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404 if self.path == "/none" else 200)
        body = {"/good": b"good", "/cut": b"half", "/big": bytes(1 << 20)}.get(self.path, b"")
        if self.path != "/drip":
            self.send_header("Content-Length", str(len(body) * (2 if self.path == "/cut" else 1)))
        self.end_headers()
        self.wfile.write(body)
        while self.path == "/drip":
            try:
                self.wfile.write(b".")
            except OSError:
                return
            time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_downloads_are_kept_checked_and_bounded(tmp_path: Path, server: str) -> None:
    media = MediaFiles(root=tmp_path, limits=FetchLimits(attempts=1, allow_private=True))
    right = hashlib.sha256(b"good").hexdigest()
    with pytest.raises(RejectedError, match="another sha256"):
        media.image(f"{server}/good", "0" * 64)
    assert not (tmp_path / "media").exists()  # a wrong answer is not kept
    Handler.asked.clear()
    for _ in range(2):
        path = media.image(f"{server}/good", right).path
        assert path is not None
        assert Path(path).read_bytes() == b"good"
    assert Handler.asked == ["/good"]
    tight = FetchLimits(attempts=1, max_bytes=1000, max_seconds=0.3, allow_private=True)
    media = MediaFiles(root=tmp_path, limits=tight)
    for name, match in (("drip", "not fetched within"), ("cut", "broke"), ("big", "larger"), ("none", "404")):
        with pytest.raises(RejectedError, match=match):
            media.image(f"{server}/{name}")
    assert len(list((tmp_path / "media").glob("*/*"))) == 1
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RejectedError, match=r"failures\.jsonl says why"):  # a finished download had its tries
        media.image(f"{server}/other")


def test_points_in_all_their_shapes() -> None:
    assert xy_pairs({"x": [1, 2], "y": [3, 4]}) == xy_pairs([{"x": 1, "y": 3}, {"x": 2, "y": 4}]) == [(1, 3), (2, 4)]
    assert xy_pairs([[1, 3]]) == [(1, 3)]
    assert xy_pairs(None) == []
    assert to_fractions([(5, 10.1)], (10, 10)) == ((0.5, 1.0),)


def test_catalog_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"no catalog 'nothing'; known: demo, molmo2"):
        load_catalog("nothing")
    (tmp_path / "c.yaml").write_text("preset: tiny\ntokenizer: t\nstages: {}\nrows: [{name: A, colour: 1}]\n")
    with pytest.raises(CatalogError, match=r"colour"):
        load_catalog(str(tmp_path / "c.yaml"))
    stage = "{num_variants: 1, examples_per_shard: 1, limits: {sequence_length: 9, max_crops: 1, max_frame: 3}}"
    (tmp_path / "c.yaml").write_text(f"preset: tiny\ntokenizer: t\nstages: {{sft: {stage}}}\nrows: []\n")
    with pytest.raises(CatalogError, match=r"unknown: max_frame"):
        load_catalog(str(tmp_path / "c.yaml"))


def test_every_row_of_the_catalog_has_a_converter() -> None:
    rows = load_catalog("demo").rows
    assert len(rows) == 10
    used = {row.converter for row in (*rows, *load_catalog("molmo2").rows)}
    assert used == set(CONVERTERS)


def test_a_file_that_two_folders_have_is_not_guessed(tmp_path: Path) -> None:
    for name in ("own/video/a", "own/video/b", "pool/video/c"):
        (tmp_path / name).mkdir(parents=True)
    media = MediaFiles(root=tmp_path / "own", templates=("video/*/{value}.*",), others=(tmp_path / "pool",))
    (tmp_path / "own/video/b/1.mp4").touch()
    (tmp_path / "pool/video/c/1.mkv").touch()  # another copy
    assert media.video("1").path == str(tmp_path / "own/video/b/1.mp4")
    (tmp_path / "own/video/a/1.webm").touch()
    with pytest.raises(RejectedError, match="several folders"):
        media.video("1")
