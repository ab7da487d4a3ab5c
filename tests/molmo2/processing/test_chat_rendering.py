"""One rendering of conversations: the exported template makes the tokens that training sees, or both refuse."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processing_cases import (
    LIMITS,
    TEMPLATE,
    example,
    image_ref,
    noise,
    reference_processor,
    tiny_layout,
    tiny_processor,
    tokenizer_dir,
)

from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import Processor
from molmo2.processing.prompts import PLAIN_STYLES
from molmo2.processing.tokenizer import MOLMO2_TOKENS, Tokenizer, TokenizerError, escape
from shards.catalog import Row
from shards.convert.common import Group
from shards.convert.reading import convert
from shards.layout import expand, sample_visuals
from shards.schema import Cue, Example, RejectedError, Source, Text
from shards.sources.media_files import MediaFiles

BASE = 512
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "|<EXTRA_TOKENS_0>|", *MOLMO2_TOKENS]
# Pieces that become special tokens when they are put side by side, and some that the tokenizer merges across them.
PIECES = [
    *SPECIAL,
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "im_",
    "end",
    "start",
    "a",
    "the cat",
    "1",
    "12",
    ".",
    " ",
    "  ",
    "\n",
    "\n\n",
]
PIECES += [
    "\t",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{COMBINING ACUTE ACCENT}",
    "\N{NO-BREAK SPACE}",
    "猫",
    "'s",
    "user\n",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
STYLES = st.sampled_from(["text_sft", "user_qa", "vqa2", "a_okvqa_mc", "android_multiple_choice", "chart_qa"])
IMAGE_FILES = [image_ref(noise(40 + 30 * n, 60, n)).data for n in range(3)]


@functools.cache
def bpe_dir() -> str:
    """A tokenizer with merges, so that tokens depend on what stands beside them."""
    directory = tempfile.mkdtemp(prefix="tokenizer-")
    texts = ["user\n\nassistant\n the cat\n\n sat  on\n  12 mats. it's <|im_end|> < |im_start |< im_patch>"] * 9
    train_demo_tokenizer(texts, directory, BASE)
    return directory


def builder() -> Processor:
    return Processor(tiny_layout(base_vocab=BASE), Tokenizer(bpe_dir(), BASE), "sft", num_variants=1)


def converted(messages: list[dict[str, Any]], style: str = "text_sft") -> Example:
    """The conversation as the converter of a dataset reads it."""
    row = Row(
        name="mine",
        stages=("sft",),
        files={"train": "*"},
        converter="chat",
        columns={"messages": "messages"},
        options={"style": style},
    )
    media, source = MediaFiles(root=Path("nowhere")), Source(file="f", row=0)
    group = Group(row=row, stage="sft", media=media, key="mine-0", sources=(source,), values=({"messages": messages},))
    (made,) = convert(group)
    if not isinstance(made, Example):
        raise RejectedError(str(made))
    return made


def sequence(processor: Processor, case: Example) -> tuple[list[int], list[bool]]:
    """All tokens of a training sample, and which of them have loss."""
    sample = processor(case, LIMITS)
    full = expand(processor.layout, sample.variants[0], sample_visuals(sample.record, 0))
    ids = [*full.input_ids.tolist(), int(full.labels[-1])]
    return ids, [False, *(weight > 0 for weight in full.weights)]


def picture(number: int) -> Image.Image:
    return Image.fromarray(noise(40 + 30 * number, 60, number))


def media_typed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as transformers loads media from it: every part has a type, and pictures are decoded."""
    made = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = [{"text": part} if isinstance(part, str) else part for part in content]
            content = [
                {"type": "image", "image": picture(part["number"])} if "number" in part else {"type": "text", **part}
                for part in parts
            ]
        made.append({**message, "content": content})
    return made


def templated(messages: list[dict[str, Any]], prompt: bool = False, **options: Any) -> list[int]:
    """The tokens from the template and the processor, as an engine calls them one after the other."""
    reference = reference_processor(bpe_dir())
    text = reference.apply_chat_template(messages, add_generation_prompt=prompt, **options)
    numbers = [
        part["number"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if "number" in part
    ]
    return list(reference(text=text, images=[picture(number) for number in numbers] or None)["input_ids"][0])


def text_part(text: str, typed: int) -> Any:
    return [{"type": "text", "text": text}, {"text": text}, text][typed]


TEXT_PARTS = st.builds(text_part, TEXTS, st.integers(0, 2))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Alternating turns, perhaps after a system message; contents are strings or parts, with up to 3 images."""
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    num_images, messages = 0, []
    for role in roles:
        content: Any = draw(TEXTS)
        if draw(st.booleans()):
            content = [draw(TEXT_PARTS) for _ in range(draw(st.integers(1, 3)))]
            if role == "user" and num_images < 3:
                typed = {"type": "image"} if draw(st.booleans()) else {}
                part = {**typed, "image": {"bytes": IMAGE_FILES[num_images]}, "number": num_images}
                content.insert(draw(st.integers(0, len(content))), part)
                num_images += 1
        messages.append({"role": draw(st.sampled_from([role, role.upper(), role.title()])), "content": content})
    return messages


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(conversations(), STYLES)
def test_the_template_makes_the_tokens_of_training(messages: list[dict[str, Any]], style: str) -> None:
    processor = builder()
    try:
        ids, loss = sequence(processor, converted(messages, style))
    except RejectedError:
        with pytest.raises(jinja2.TemplateError, match="empty answer"):
            templated(messages, style=style)
        return
    assert templated(messages, style=style) == ids
    asked = processor.prompt(converted(messages, style), LIMITS)
    assert templated(messages[:-1], prompt=True, style=style) == asked.input_ids.tolist()
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "style": style}
    whole = reference_processor(bpe_dir()).apply_chat_template(media_typed(messages), **options)
    assert whole["input_ids"][0] == ids
    assert [bool(flag) for flag in whole["assistant_masks"][0]] == loss


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool", "developer", "User"]), max_size=5))
def test_other_turns_are_refused_by_both(roles: list[str]) -> None:
    messages = [{"role": role, "content": "x"} for role in [*roles, "assistant"]]
    try:
        ids, _ = sequence(builder(), converted(messages))
    except RejectedError:
        with pytest.raises(jinja2.TemplateError, match=r"is of role|no message"):
            templated(messages)
    else:
        assert templated(messages) == ids


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS.map(str.strip).filter(bool), max_size=3))
def test_subtitles_follow_the_visuals_as_in_training(lines: list[str]) -> None:
    cues = tuple(Cue(start=None, end=None, text=line) for line in lines)
    messages = [{"role": "user", "content": [{"type": "image", "image": {"bytes": IMAGE_FILES[0]}, "number": 0}, "q"]}]
    messages.append({"role": "assistant", "content": "a"})
    case = converted(messages)
    ids, _ = sequence(builder(), example(*case.annotations, images=case.images, subtitles=cues))
    said = [{"role": "subtitle", "content": "\n".join(lines)}, *messages]
    assert templated(said) == ids


def test_no_text_becomes_a_special_token() -> None:
    tokenizer = Tokenizer(bpe_dir(), BASE)
    reference = reference_processor(bpe_dir()).tokenizer
    special = {reference.convert_tokens_to_ids(token) for token in SPECIAL}
    assert len(special) == len(SPECIAL)
    text = "".join(SPECIAL) + "<" + "".join(SPECIAL)
    for ids in (tokenizer.encode(text), reference(escape(text))["input_ids"]):
        assert not special & set(ids)
    assert escape("<|im_end|>") == "< |im_end|>" and escape("a < b, <points>, |x|") == "a < b, <points>, |x|"
    assert tokenizer.decode(tokenizer.encode(text)) == escape(text)


def test_a_tokenizer_with_tokens_that_texts_could_hold_is_refused(tmp_path: Path) -> None:
    text = (Path(tokenizer_dir()) / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|endoftext|>", "[PAD]"))
    with pytest.raises(TokenizerError, match=r"'\[PAD\]' in a text"):
        Tokenizer(tmp_path, 320)


def test_the_styles_without_prefix_are_those_of_training() -> None:
    names = TEMPLATE.read_text().split("plain_styles = [")[1].split("]")[0]
    assert {name.strip(" \n'") for name in names.split(",")} == PLAIN_STYLES


def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
    return reference_processor().apply_chat_template(messages, **options)


def test_the_style_is_a_variable_or_a_key_of_the_question() -> None:
    asked = {"role": "user", "content": "What?"}
    wanted = "<|im_end|><|im_start|>user\nvqa2: What?<|im_end|>"
    assert rendered([asked], style="vqa2") == rendered([{**asked, "style": "vqa2"}]) == wanted
    assert rendered([asked], style="user_qa") == rendered([asked]) == wanted.replace("vqa2: ", "")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video"},
        {"type": "video", "video": "v.mp4"},
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"video": "v.mp4"},
        {"video_url": {"url": "v.mp4"}},
    ],
)
def test_parts_of_other_engines_are_understood(part: dict[str, Any]) -> None:
    content = [part, {"type": "text", "text": "a "}, {"type": "text", "text": None}, {"text": "b"}]
    asked = {"role": "USER", "content": content}
    assert rendered([asked]) == "<|im_end|><|video|><|im_start|>user\na b<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], {}, "not audio"),
        ([{"role": "user", "content": [{}]}], {}, "not empty"),
        ([{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}], {}, "images or one video"),
        ([{"role": "user", "content": "x"}], {"tools": [{"type": "function"}]}, "without tools"),
        ([{"role": "user", "content": "x"}, {"role": "assistant"}], {}, "empty answer"),
        ([{"role": "system", "content": "x"}], {}, "no message of the user"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            {"add_generation_prompt": True},
            "the last message is one",
        ),
    ],
)
def test_what_training_never_has_is_refused(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=message):
        rendered(messages, **options)


def test_an_answer_can_be_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It is "}]
    assert rendered(messages, continue_final_message=True).endswith("<|im_start|>assistant\nIt is")


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_texts_stay_letters(token: str) -> None:
    processor = tiny_processor()
    messages = [{"role": "user", "content": f"What is {token}?"}, {"role": "assistant", "content": f"It is {token}."}]
    ids, _ = sequence(processor, converted(messages))
    special = processor.tokenizer._tokenizer.token_to_id(token)
    plain, _ = sequence(processor, converted([{**m, "content": "x"} for m in messages]))
    assert special is not None and ids.count(special) == plain.count(special)
    assert f"It is {escape(token)}." in processor.tokenizer.decode(ids)


def test_space_around_texts_changes_nothing() -> None:
    """A question of the web page and an answer of a dataset with a space and a line break around them."""
    wanted, got = (
        sequence(builder(), example(Text(style="user_qa", question=f"{space}q{space}", answer=f"{space}a{space}")))
        for space in ("", " \n\n")
    )
    assert got == wanted
