"""What lmms-eval asks, in our terms: conversations, media, generation arguments, stop texts, the budget of failures."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from tiny_models import prompts, speaker

from molmo2.eval.lmms.replies import Failures, TooManyFailuresError, limits_of, prepared_ahead, replies
from molmo2.eval.lmms.requests import cut, example_of, generation_of
from molmo2.model.generate import Sampling, generate
from molmo2.model.molmo2 import Molmo2
from shards.media.images import load_image
from shards.schema import Chat, ImageRef, RejectedError, Turn, VideoRef


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def shown(path: str, kind: str = "image", **more: Any) -> dict[str, Any]:
    return {"type": kind, "url": path, **more}


def said(*messages: dict[str, Any]) -> list[tuple[str, str]]:
    (annotation,) = example_of(messages).annotations
    assert isinstance(annotation, Chat)
    return [(turn.role, turn.text) for turn in annotation.turns]


@pytest.mark.parametrize(
    ("arguments", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0, "top_p": 0}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7, top_p=0.9)),
        ({"temperature": 0.7, "do_sample": False}, Sampling()),
        ({"temperature": 1, "top_k": 1}, Sampling()),
        ({"do_sample": True, "seed": 42}, Sampling(temperature=1.0, seed=42)),
        ({"do_sample": True, "temperature": 0.0}, Sampling()),
    ],
)
def test_sampling_follows_the_task(arguments: dict[str, Any], sampling: Sampling) -> None:
    assert generation_of(arguments).sampling == sampling


def test_generation_arguments() -> None:
    found = generation_of({"max_new_tokens": 16, "until": ["\n\n", ""], "num_beams": 1, "repetition_penalty": None})
    assert (found.max_new_tokens, found.until, found.ignored) == (16, ("\n\n",), {})
    found = generation_of({"until": "stop", "num_beams": 4, "temperature": 1, "top_k": 5, "top_p": None}, seed=3)
    assert (found.max_new_tokens, found.until) == (1024, ("stop",))
    assert found.ignored == {"num_beams": 4, "top_k": 5}
    assert found.sampling == Sampling(temperature=1.0, seed=3)
    with pytest.raises(ValueError, match="max_new_tokens is -1"):
        generation_of({"max_new_tokens": -1})


def test_an_answer_ends_before_the_first_stop_text() -> None:
    assert cut("a b c", ["c", "b"]) == "a "
    assert cut("a b c", ["x"]) == cut("a b c", []) == "a b c"


def test_a_question_about_images() -> None:
    example = example_of([user(shown("a.png"), shown("b.png"), "Which is red?\nA. one")])
    assert example.images == (ImageRef(path="a.png"), ImageRef(path="b.png"))
    assert example.annotations == (Chat(style="user_qa", turns=(Turn(role="user", text="Which is red?\nA. one"),)),)


def test_images_among_the_text_leave_their_names() -> None:
    assert said(user(shown("a"), "Like this?", shown("b"), "or\n", shown("c"))) == [
        ("user", "Like this? Image 2 or Image 3")
    ]
    assert said(user("See ", shown("a"), "what?")) == [("user", "See what?")]  # one image needs no name


def test_conversations() -> None:
    system = {"role": "system", "content": "Be short."}
    answer = {"role": "assistant", "content": "yes"}
    assert said(system, user("a?"), user("b?"), answer, user("c?")) == [
        ("user", "System: Be short.\na?\nb?"),
        ("assistant", "yes"),
        ("user", "c?"),
    ]
    for wrong in ([], [answer], [user("a?"), answer]):
        with pytest.raises(RejectedError, match="take turns"):
            example_of(wrong)


@pytest.mark.parametrize(
    "part",
    [
        shown("v.mp4", "video", start_time=1, end_time=2.5),
        {"type": "video", "url": {"type": "video", "path": "v.mp4", "video_start": 1, "video_end": 2.5}},
        {"type": "video", "url": {"url": "v.mp4", "video_start": 1.0, "video_end": 2.5}},
    ],
)
def test_a_clip(part: dict[str, Any]) -> None:
    assert example_of([user(part, "what?")]).video == VideoRef(path="v.mp4", start=1.0, end=2.5)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([shown("a.wav", "audio")], "content of type audio"),
        ([shown("v.mp4", "video"), shown("w.mp4", "video")], "2 videos and 0 images"),
        ([shown("v.mp4", "video"), shown("a.png")], "1 videos and 1 images"),
        ([shown("https://x/a.png")], "https://x/a.png: images are read from files"),
        ([shown("https://x/v.mp4", "video")], "the path of a file is needed"),
        ([{"type": "image", "url": 3}], "an image given as int"),
    ],
)
def test_what_no_prompt_holds_is_refused(parts: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(RejectedError, match=told):
        example_of([user(*parts, "what?")])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_in_memory_is_what_its_file_is(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (7, 9, 4), np.uint8), "RGBA").convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    with PIL.Image.open(tmp_path / "a.png") as opened:
        (made,) = example_of([user(shown(opened), "?")]).images  # type: ignore[arg-type]
    assert np.array_equal(load_image(made), load_image(ImageRef(path=str(tmp_path / "a.png"))))


def test_failures_have_a_budget() -> None:
    failures = Failures(200)
    for number in range(2):
        assert "which counts as a wrong one: t 1: gone" in failures.add("t 1", ValueError("gone")), number
    with pytest.raises(TooManyFailuresError, match="3 of 200 questions cannot be asked, at most 1% may fail:\n"):
        failures.add("t 2", ValueError("gone"))


def test_limits_take_the_most_frames() -> None:
    assert limits_of(None).max_frames == 384
    assert limits_of(16).max_frames == 16
    assert limits_of(None).max_images > 100
    with pytest.raises(ValueError, match="max_frames=0"):
        limits_of(0)


def test_batches_are_prepared_in_order() -> None:
    found = list(prepared_ahead(lambda item: item * 2, range(5), 2))
    assert found == [[(0, 0), (1, 2)], [(2, 4), (3, 6)], [(4, 8)]]
    assert list(prepared_ahead(str, [], 2)) == []
    with pytest.raises(ZeroDivisionError):
        list(prepared_ahead(lambda item: 1 // item, [1, 0], 1))


class Letters:
    """A tokenizer of one letter a token."""

    eos = -1

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + one % 26) for one in ids)


@pytest.fixture(scope="module")
def model() -> Molmo2:
    return speaker()


def test_answers_stop_early(model: Molmo2) -> None:
    rows = generate(model, prompts(4, 9), 12, Letters.eos)
    whole = [Letters().decode(row) for row in rows]
    stop = whole[1][3:5]
    found = replies(model, Letters(), prompts(4, 9), generation_of({"max_new_tokens": 12, "until": [stop]}))  # type: ignore[arg-type]
    assert [reply.text for reply in found] == [cut(text, [stop]) for text in whole]
    assert found[1].num_tokens == whole[1].index(stop) + 2 < 12
