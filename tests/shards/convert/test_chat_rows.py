"""Conversations in the forms that people have them: roles, parts, marks, and media in columns."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from shards.catalog import Row
from shards.convert.common import Group
from shards.convert.reading import convert
from shards.schema import Chat, Example, RejectedError, Source
from shards.sources.media_files import MediaFiles


def converted(root: Path, messages: list[dict[str, Any]], **columns: Any) -> Example:
    row = Row(
        name="mine",
        stages=("sft",),
        files={"train": "*"},
        converter="chat",
        columns={name: name for name in ("messages", "image", "video", "start", "end")},
        options={"style": "user_qa"},
    )
    values = ({"messages": messages, **columns},)
    group = Group(
        row=row,
        stage="sft",
        media=MediaFiles(root=root),
        key="mine-0",
        sources=(Source(file="f", row=0),),
        values=values,
    )
    (example,) = convert(group)
    assert isinstance(example, Example)
    return example


def said(example: Example) -> list[str]:
    (chat,) = example.annotations
    assert isinstance(chat, Chat)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * (len(chat.turns) // 2)
    return [turn.text for turn in chat.turns]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "v.mp4").touch()
    return tmp_path


def names(example: Example) -> list[str]:
    return [Path(image.path or "").name for image in example.images]


def asked(content: Any, answer: str = "Yes.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_text_alone_is_left_as_it_is(root: Path) -> None:
    example = converted(root, asked("What does <video src='a.mp4'> mean in HTML?"))
    assert said(example)[0] == "What does <video src='a.mp4'> mean in HTML?"
    assert not example.images and not example.video


@pytest.mark.parametrize(
    ("content", "media"),
    [
        ("<image>\nWhat colour?", {}),
        ("<image>\nWhat colour?", {"image": None}),
        ("<image>\nWhat colour?", {"image": [None]}),
        ("<image 1> What colour?", {}),
        ("<video>\nWhat happens?", {}),
        ("<video>\nWhat happens?", {"image": "a.png"}),
        ("<image>\nAnd <image>?", {"image": "a.png"}),
        ("<image 2>?", {"image": "a.png"}),
        ("<image> <image> <image>?", {"image": ["a.png", "b.png"]}),
        ("<video>\nAnd <video>?", {"video": "v.mp4"}),
        ("<image>\nAnd <video>?", {"video": "v.mp4"}),
    ],
)
def test_marks_without_media_are_rejected(root: Path, content: str, media: dict[str, Any]) -> None:
    with pytest.raises(RejectedError, match=r"<(image|video)"):
        converted(root, asked(content), **media)


@pytest.mark.parametrize("mark", ["<video>", "<image>"])
def test_a_video_has_either_mark(root: Path, mark: str) -> None:
    assert said(converted(root, asked(f"{mark}\nWhat happens?"), video="v.mp4"))[0] == "What happens?"


def test_a_missing_image_in_a_list_is_rejected(root: Path) -> None:
    with pytest.raises(RejectedError, match="no image in the row"):
        converted(root, asked("Is it red?"), image=["a.png", None])


def test_roles_and_marks_of_llava(root: Path) -> None:
    messages = [
        {"from": "human", "value": "<image>\nIs it red?"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "Black?"},
        {"from": "gpt", "value": "Yes."},
    ]
    example = converted(root, messages, image="a.png")
    assert said(example) == ["Is it red?", "No.", "Black?", "Yes."] and names(example) == ["a.png"]


def test_several_images_are_named_where_they_stand(root: Path) -> None:
    two = converted(root, asked("<image>\nIs it like <image>?"), image=["a.png", "b.png"])
    assert said(two)[0] == "Is it like Image 2?" and names(two) == ["a.png", "b.png"]
    both = converted(root, asked("<image>\n<image>\nAre they alike?"), image=["a.png", "b.png"])
    assert said(both)[0] == "Are they alike?"
    later = [*asked("<image> Red?"), *asked("And <image>?")]
    assert said(converted(root, later, image=["a.png", "b.png"]))[2] == "And Image 2?"
    with pytest.raises(RejectedError, match="stands 1 times in texts about 2 images"):
        converted(root, asked("<image> Alike?"), image=["a.png", "b.png"])


def test_media_as_parts_of_a_message(root: Path) -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Like"},
             {"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "this?"}]  # fmt: skip
    example = converted(root, asked(parts))
    assert said(example)[0] == "Like Image 2 this?" and names(example) == ["a.png", "b.png"]
    untyped = [{"image": "a.png"}, "Like", {"image_url": {"url": "b.png"}}, {"text": "this?"}]
    assert converted(root, asked(untyped)) == example
    clip = [{"type": "video_url", "video_url": {"url": "v.mp4"}}, {"type": "text", "text": "Bright?"}]
    example = converted(root, asked(clip), start=1.0, end=2.0)
    assert said(example)[0] == "Bright?" and example.video is not None
    assert (Path(example.video.path).name, example.video.start, example.video.end) == ("v.mp4", 1.0, 2.0)


def test_what_cannot_be_shown_is_rejected(root: Path) -> None:
    with pytest.raises(RejectedError, match="1 images and 1 videos"):
        converted(root, asked("?"), image="a.png", video="v.mp4")
    with pytest.raises(RejectedError, match="must be text, an image or a video"):
        converted(root, asked([{"type": "audio", "audio": "a.wav"}]))
    with pytest.raises(RejectedError, match="does not exist"):
        converted(root, asked("?"), image="c.png")
