"""Samples in published layouts, written by hand, are recognised; test_own_rows builds them."""

from __future__ import annotations

from typing import Any

import pytest

from shards.convert.layout_columns import Layout, UnsureError, split_and_stem
from shards.convert.recognise import coco, numbered_classes, recognise_folder, recognise_rows

SHAREGPT = {
    "id": "identity_0",
    "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi! How can I help?"}],
}
LLAVA = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "White and red."},
    ],
}
MS_SWIFT = {
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "<image><image>What differs?"},
        {"role": "assistant", "content": "The colour."},
    ],
    "images": ["/data/a.jpg", "/data/b.png"],
}
SWIFT_VIDEO = {**MS_SWIFT, "images": None, "videos": ["clips/1.mp4"]}
OPENAI = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "https://a.example/1.jpg"}},
            ],
        },
        {"role": "assistant", "content": "A cat."},
    ]
}
QWEN = {
    "messages": [
        {"role": "user", "content": [{"type": "video", "video": "v/1.mp4"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It rains."}]},
    ]
}


@pytest.mark.parametrize(
    ("row", "media", "columns"),
    [
        (SHAREGPT, "text", {"messages": "conversations"}),
        (LLAVA, "image", {"messages": "conversations", "image": "image"}),
        (MS_SWIFT, "image", {"messages": "messages", "image": "images"}),
        (SWIFT_VIDEO, "video", {"messages": "messages", "video": "videos"}),
        (OPENAI, "image", {"messages": "messages"}),
        (QWEN, "video", {"messages": "messages"}),
    ],
)
def test_conversations(row: dict[str, Any], media: str, columns: dict[str, str]) -> None:
    layout = recognise_rows([row], {})
    assert layout is not None and layout.keys["converter"] == "chat"
    assert (layout.media, layout.keys["columns"]) == (media, columns)


EMBEDDED = {"bytes": b"\x89PNG", "path": "1.png"}


@pytest.mark.parametrize(
    ("row", "converter", "columns"),
    [
        (
            {"image": EMBEDDED, "query": "How many bars?", "label": ["3"], "answer": "3"},
            "image_qa",
            {"image": "image", "question": "query", "answer": "answer"},
        ),
        ({"image": EMBEDDED, "text": "a cat"}, "image_caption", {"image": "image", "caption": "text"}),
        ({"file_name": "0001.png", "text": "a cat"}, "image_caption", {"image": "file_name", "caption": "text"}),
        (
            {"file_name": "clip.mp4", "question": "What?", "answer": "Rain."},
            "video_qa",
            {"video": "file_name", "question": "question", "answer": "answer"},
        ),
        (
            {"video": "a/clip.webm", "start": 1.0, "end": 2.5, "caption": "Rain."},
            "video_caption",
            {"video": "video", "video_long_caption": "caption", "start": "start", "end": "end"},
        ),
        (
            {"images": ["a.jpg"], "query": "What?", "response": "A cat."},
            "image_qa",
            {"image": "images", "question": "query", "answer": "response"},
        ),
    ],
)
def test_questions_and_captions(row: dict[str, Any], converter: str, columns: dict[str, str]) -> None:
    layout = recognise_rows([row, row], {})
    assert layout is not None and layout.keys["converter"] == converter
    assert layout.keys["columns"] == columns


@pytest.mark.parametrize(
    ("answer", "form"),
    [(0, "index"), ("0", "index"), ("B", "letter"), ("(C)", "letter"), ("a dog", "text"), ("A. a cat", None)],
)
def test_forms_of_right_options(answer: Any, form: str | None) -> None:
    row = {"image": "1.jpg", "question": "Which?", "choices": ["a cat", "a dog"], "answer": answer}
    if form is None:
        with pytest.raises(UnsureError, match=r"how is the right option given.*--choose answer=index"):
            recognise_rows([row], {})
        form = "letter"
        layout = recognise_rows([row], {"answer": form})
    else:
        layout = recognise_rows([row], {})
    assert layout is not None and layout.keys["options"] == {"style": "user_qa", "answer": form}


@pytest.mark.parametrize(
    ("answers", "first"), [([0, 1, 3], None), ([1, 2, 4], 1), (["1", "4"], 1), ([1, 2, 3], "asked"), ([0, 4], "mixed")]
)
def test_the_number_of_the_first_option(answers: list[Any], first: Any) -> None:
    """Four options: a 0 shows that they are counted from 0, and a 4 that they are counted from 1."""
    for media in ({"image": "1.jpg"}, {"video": "1.mp4"}):
        rows = [{**media, "question": "Which?", "options": list("abcd"), "answer": answer} for answer in answers]
        if first == "mixed":
            with pytest.raises(ValueError, match="from 0 in some rows and from 1 in others"):
                recognise_rows(rows, {})
            continue
        if first == "asked":
            with pytest.raises(UnsureError, match=r"number does the first answer option.*--choose first=0"):
                recognise_rows(rows, {})
        layout = recognise_rows(rows, {"first": "1"} if first == "asked" else {})
        assert layout is not None and layout.keys["options"]["answer"] == "index"
        assert layout.keys["options"].get("first") == (1 if first == "asked" else first)


def test_instructions_become_conversations() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Go on.", "input": "", "output": "4", "system": "Be brief.", "history": [["Count.", "1 2 3"]]},
    ]
    layout = recognise_rows(rows, {})
    assert layout is not None and (layout.keys["converter"], layout.media) == ("chat", "text")
    spoken = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in layout.rows]
    assert spoken == [
        [("user", "Add.\n1 and 2"), ("assistant", "3")],
        [("system", "Be brief."), ("user", "Count."), ("assistant", "1 2 3"), ("user", "Go on."), ("assistant", "4")],
    ]
    seen = recognise_rows([{**row, "image": "a.png"} for row in rows], {})
    assert seen is not None and (seen.media, seen.media_column) == ("image", "image")
    assert [row["image"] for row in seen.rows] == ["a.png"] * 2 and seen.rows[0]["messages"] == layout.rows[0][
        "messages"
    ]
    plain = recognise_rows([{"instruction": "What?", "input": "", "output": "A cat.", "image": "a.png"}], {})
    assert plain is not None and plain.keys["converter"] == "image_qa"
    with pytest.raises(ValueError, match="join instruction and input"):
        recognise_rows([{**rows[0], "image": EMBEDDED}], {})


def test_the_unit_of_points_is_seen_or_asked() -> None:
    def layout(points: Any, **answers: str) -> Layout | None:
        return recognise_rows([{"image": "1.jpg", "label": "cats", "points": points}], answers)

    for points, scale in (([{"x": 0.2, "y": 1.0}], "unit"), ([[1200, 30]], "pixel")):
        assert (found := layout(points)) is not None and found.keys["options"]["scale"] == scale
    with pytest.raises(UnsureError, match=r"up to 75: .*percent, pixel, thousand.*--choose scale=percent"):
        layout([{"x": 25.0, "y": 75.0}])
    assert (found := layout([{"x": 25.0, "y": 75.0}], scale="percent")) and found.keys["options"]["scale"] == "percent"
    with pytest.raises(UnsureError, match="up to 640"):
        layout([[640, 2]], scale="percent")


def test_classes_get_a_question() -> None:
    layout = recognise_rows([{"path": "a/1.jpg", "label": "red_panda"}], {})
    assert layout is not None
    assert layout.rows == [{"image": "a/1.jpg", "question": "What does the picture show?", "answer": "red panda"}]
    named = recognise_rows([{"path": "a/1.jpg", "label": 3, "class_name": "red_panda"}], {})
    assert named is not None and named.rows == layout.rows
    numbered = [{"path": "a/1.jpg", "label": 1}]
    assert recognise_rows(numbered, {}) is None
    layout = numbered_classes(numbered, {"label": ["cat", "red_panda"]})
    assert layout is not None
    assert [(row["label"], row["answer"]) for row in layout.classes] == [(0, "cat"), (1, "red panda")]
    with pytest.raises(ValueError, match=r"column label holds numbers of classes \(1, ...\).*add a column class_name"):
        numbered_classes(numbered, {})
    assert numbered_classes([{"path": "a/1.jpg", "label": 0.5}], {"label": []}) is None


def test_coco_boxes_and_keypoints_become_points() -> None:
    document = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 100, "height": 80}],
        "categories": [
            {"id": 1, "name": "person", "keypoints": ["nose", "left_eye"]},
            {"id": 2, "name": "traffic_light"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 2, "bbox": [10, 20, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10]},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "keypoints": [5, 6, 2, 0, 0, 0]},
        ],
    }
    layout = coco(document)
    assert layout is not None and layout.keys["options"]["scale"] == "pixel"
    assert layout.rows == [
        {"image": "7.jpg", "label": "traffic light", "points": [{"x": 25.0, "y": 40.0}, {"x": 5.0, "y": 5.0}]},
        {"image": "7.jpg", "label": "nose of the person", "points": [{"x": 5, "y": 6}]},
    ]
    assert coco({"data": []}) is None


def test_folders_without_a_table() -> None:
    files = ["p/1.jpg", "p/1.txt", "p/2.jpeg", "p/3.png", "p/3.txt", "p/readme.txt"]
    layout = recognise_folder(files, lambda name: f" text of {name}\n")
    assert layout is not None
    assert layout.rows == [{"image": f"p/{n}", "caption": f"text of p/{n[0]}.txt"} for n in ("1.jpg", "3.png")]
    layout = recognise_folder(["p/train/cat/1.jpg", "p/train/red_panda/1.jpg"], str)
    assert layout is not None and [row["answer"] for row in layout.rows] == ["cat", "red panda"]
    assert recognise_folder(["p/1.jpg", "p/2.jpg"], str) is None


@pytest.mark.parametrize(
    ("name", "split", "stem"),
    [
        ("data/train-00000-of-00002.parquet", "train", "data/.parquet"),
        ("data/validation-00000-of-00001.parquet", "validation", "data/.parquet"),
        ("annotations/instances_val2017.json", "validation", "annotations/instances_.json"),
        ("val/cats", "validation", "/cats"),
        ("training_data.json", "train", "training_data.json"),
        ("latest.json", "train", "latest.json"),
    ],
)
def test_splits_by_name(name: str, split: str, stem: str) -> None:
    assert split_and_stem(name)[0] == split
    if name != "training_data.json":
        assert split_and_stem(name)[1] == stem


@pytest.mark.parametrize(
    "row", [{"a": 1}, {"instruction": "x", "answer": "y"}, {"image": "1.jpg"}, {"text": "only text"}]
)
def test_other_tables_are_not_guessed(row: dict[str, Any]) -> None:
    assert recognise_rows([row], {}) is None
