import re

import numpy as np
import pytest
from processing_cases import tiny_tokenizer

from molmo2.processing.chat_format import assemble, encode_messages, token_weight
from molmo2.processing.choice import INSTRUCTION, render_choice
from molmo2.processing.contract import templates
from molmo2.processing.prompts import PLAIN_STYLES, render_messages
from shards.catalog import load_catalog
from shards.catalog.styles import STYLES, styles_in
from shards.schema import Chat, Choice, PointGroup, Points, RejectedError, Text, TrackGroup, Tracks, Turn

CAT = Points(style="pointing", label="Black Cat", groups=(PointGroup(at=1, points=((0.5, 0.25),)),))
SPAN = '<points coords="1 1 500 250">Black Cat</points>'


def ask(annotation, mode="eval", rng=None, video=False) -> tuple[str, str]:
    user, assistant = render_messages(annotation, mode, rng, video=video)
    assert (user.role, assistant.role) == ("user", "assistant")
    return user.content, assistant.content


def rngs(count: int):
    return [np.random.default_rng(seed) for seed in range(count)]


def with_style(annotation, style: str):
    return type(annotation)(**{**{f: getattr(annotation, f) for f in annotation.__slots__}, "style": style})


def test_pretraining_names_the_style_and_the_length() -> None:
    caption = Text(style="long_caption", answer="x" * 600)
    assert ask(caption, "pretraining") == ("long_caption 65:", "x" * 600)
    asked = [ask(caption, "pretraining", rng)[0] for rng in rngs(400)]
    bare = sum(a == "long_caption:" for a in asked)
    hints = np.array([int(a.split()[1][:-1]) for a in asked if a != "long_caption:"])
    assert 20 < bare < 60  # 10 %
    assert abs(hints.mean() - 39.5) < 0.5 and 1 < hints.std() < 2.5  # (600 + Normal(0, 25)) // 15
    assert ask(Text(style="text_sft", question="Why?", answer="So."), "pretraining")[0] == "text_sft 65: Why?"
    brief = {ask(Text(style="transcript", answer="x"), "pretraining", rng)[0] for rng in rngs(200)}
    assert "transcript 0:" in brief and not any("-" in hint for hint in brief)


def test_pretraining_points_have_no_hint_and_a_tab() -> None:
    assert ask(CAT, "pretraining", np.random.default_rng(0)) == ("pointing: Black Cat", SPAN)
    two = Points(
        style="video_point",
        label="Cat",
        groups=(PointGroup(at=0.5, points=((0, 0),)), PointGroup(at=1.0, points=((1, 1),))),
    )
    assert ask(two, "pretraining", video=True)[1] == '<points coords="0.5 1 000 000\t1.0 2 1000 1000">Cat</points>'
    assert ask(two, "sft", video=True)[1] == '<points coords="0.5 1 000 000;1.0 2 1000 1000">Cat</points>'


def test_after_pretraining_only_academic_styles_are_named() -> None:
    assert ask(Text(style="vqa2", question="What?", answer="a"))[0] == "vqa2: What?"
    assert ask(Text(style="user_qa", question="What?", answer="a"))[0] == "What?"
    assert ask(Text(style="long_caption", answer="a"))[0] == templates()["long_caption"][0]
    assert ask(Text(style="video_merged_caption", answer="a"))[0] == "video_merged_caption:"
    drawn = {ask(Text(style="long_caption", answer="a"), "sft", rng)[0] for rng in rngs(400)}
    assert drawn == set(templates()["long_caption"])
    with pytest.raises(RejectedError, match="'user_qa' has neither a question nor a template"):
        ask(Text(style="user_qa", answer="a"))


@pytest.mark.parametrize(
    ("style", "answer", "none"),
    [
        ("pointing", SPAN, "There are none."),
        ("point_count", f"Counting the {SPAN} shows a total of 1.", "There are none."),
        ("count_then_point", f"There are 1 {SPAN}.", "There are none."),
        ("count", "1", "0"),
    ],
)
def test_point_modes(style, answer, none) -> None:
    question, got = ask(with_style(CAT, style))
    assert got == answer and "Black Cat" in question
    assert ask(Points(style=style, label="x", groups=()))[1] == none


def test_every_template_is_complete() -> None:
    for style, options in templates().items():
        assert len(set(options)) == len(options) >= 2, style
        placeholders = {name for name in ("{label}", "{point}", "{fps}", "{question}") if name in "".join(options)}
        assert len(placeholders) <= 1 and all(option.count(name) == 1 for name in placeholders for option in options)
        assert all(option.count("{") == len(placeholders) for option in options), style
        for option in options:  # a label may be singular or plural
            assert not re.search(
                r"\b(an?|one|each|every|is|are|this|these) {label}|(?<!many ){label} (is|are)\b", option
            )


@pytest.mark.parametrize(
    ("style", "number"),
    [
        ("long_caption", 23),
        ("short_caption", 11),
        ("transcript", 5),
        ("pointing", 43),
        ("point_count", 60),
        ("count_then_point", 6),
        ("count", 6),
        ("multi_image_pointing", 11),
        ("multi_image_point_then_count", 14),
        ("multi_image_counting", 9),
        ("video_point_track_per_frame", 8),
        ("video_short_answer", 15),
        ("video_motion_caption", 10),
    ],
)
def test_a_style_has_as_many_forms_as_in_molmo2(style: str, number: int) -> None:
    assert len(templates()[style]) >= number


@pytest.mark.parametrize("style", ["video_short_answer", "cosyn_chart_exp", "cosyn_doc_exp"])
def test_a_question_is_asked_in_one_of_the_forms_of_its_style(style: str) -> None:
    text = Text(style=style, question="Why {so}?", answer="So.")
    forms = [form.replace("{question}", "Why {so}?") for form in templates()[style]]
    assert ask(text)[0] == f"{style}: {forms[0]}"
    assert {ask(text, "sft", rng)[0] for rng in rngs(200)} == {f"{style}: {form}" for form in forms}
    assert ask(text, "pretraining", np.random.default_rng(0))[0].endswith(": Why {so}?")
    with pytest.raises(RejectedError, match=f"style '{style}' needs a question"):
        ask(Text(style=style, answer="So."))


def test_a_caption_of_motion_is_asked_for() -> None:
    caption = Text(style="video_motion_caption", answer="It turns.")
    assert ask(caption)[0] == f"video_motion_caption: {templates()['video_motion_caption'][0]}"


def test_points_in_all_of_several_images_are_asked_for_in_two_ways() -> None:
    points = Points(style="multi_image_pointing", label="My Cat", groups=CAT.groups)
    asked = [ask(points, "sft", rng) for rng in rngs(200)]
    single = [question in {text.format(label="My Cat") for text in templates()["pointing"]} for question, _ in asked]
    assert 0.4 < np.mean(single) < 0.6
    assert asked[0][1] == '<points coords="1 1 500 250">My Cat</points>', "labels of several images stay as they are"
    assert ask(points)[0] == templates()["multi_image_pointing"][0].format(label="My Cat")


def test_a_question_of_the_data_is_asked_in_pretraining_too() -> None:
    asked = Points(style="cosyn_point", label="bar", question="Where is the left bar?", groups=CAT.groups)
    assert ask(asked, "pretraining")[0] == "cosyn_point: Where is the left bar?"
    assert ask(with_style(CAT, "cosyn_point"), "pretraining")[0] == "cosyn_point: Black Cat"


TRACK = Tracks(
    style="video_point_track_per_frame",
    label="ball",
    fps=1.0,
    groups=(
        TrackGroup(time=0.0, objects=()),
        TrackGroup(time=1.0, objects=((4, 0.1, 0.2),)),
        TrackGroup(time=2.0, objects=((4, 0.2, 0.2),)),
        TrackGroup(time=3.0, objects=((4, 0.3, 0.2),)),
    ),
)


def test_tracks() -> None:
    question, answer = ask(TRACK)
    assert question == f"{templates()['video_point_track_per_frame'][0].format(label='ball')} Answer at 1 FPS."
    assert answer == '<tracks coords="1.0 1 100 200;2.0 1 200 200;3.0 1 300 200">ball</tracks>'
    assert "FPS" not in ask(Tracks(style=TRACK.style, label="ball", fps=2.0, groups=TRACK.groups))[0]
    single = Tracks(style="video_single_point_track_per_frame", label="ball", fps=2.0, groups=TRACK.groups)
    for rng in rngs(20):  # a question about a single object always tells the rate
        assert re.search(r"\b2\b", ask(single, "sft", rng)[0].split("</points>")[1])
    ends = ask(with_style(TRACK, "video_point_ground_start_end"))[1]
    assert ends == '<tracks coords="1.0 1 100 200;3.0 1 300 200">ball</tracks>'


def test_answers_stand_on_the_grid_of_their_rate_but_for_first_and_last_frames() -> None:
    """Thirds of a second were sampled and half seconds are asked for: whole seconds are both."""
    groups = tuple(TrackGroup(time=i / 3, objects=((0, i / 10, 0.5),)) for i in range(7))
    tracks = Tracks(style=TRACK.style, label="ball", fps=2.0, groups=groups)
    assert ask(tracks)[1] == '<tracks coords="0.0 1 000 500;1.0 1 300 500;2.0 1 600 500">ball</tracks>'
    ends = (TrackGroup(time=0, objects=(), occluded=(0,)), *groups[1:5], TrackGroup(time=5 / 3, objects=((7, 0, 0),)))
    answer = ask(Tracks(style="video_point_ground_start_end", label="ball", fps=2.0, groups=ends))[1]
    assert answer == '<tracks coords="1.3 1 400 500;1.7 2 000 000">ball</tracks>', "occluded in its first frame"
    gone = ask(Tracks(style=TRACK.style, label="ball", fps=2.0, groups=groups[1:3]))[1]
    assert gone == "No tracks available."


def test_single_track_starts_where_the_question_points() -> None:
    single = with_style(TRACK, "video_single_point_track_per_frame")
    question, answer = ask(single)
    assert '<points coords="1.0 1 100 200">ball</points>' in question
    assert answer == '<tracks coords="2.0 1 200 200;3.0 1 300 200">ball</tracks>', "frames after the point"
    starts = [question.split('"')[1].split()[0] for rng in rngs(300) for question, _ in [ask(single, "sft", rng)]]
    assert {"1.0", "2.0", "3.0"} == set(starts)
    assert 0.06 < np.mean([start != "1.0" for start in starts]) < 0.21  # 20 % drawn, a third of them draws the first
    with pytest.raises(RejectedError, match="visible in no frame"):
        ask(Tracks(style=single.style, label="x", fps=2.0, groups=TRACK.groups[:1]))


MC = Choice(style="video_multiple_choice", question="Which?", options=("one", "two", "three"), answer=1)


def test_choice_has_one_form_in_evaluation() -> None:
    assert ask(MC) == (f"Which?\n{INSTRUCTION}\nA. one\nB. two\nC. three", "B. two")


def test_choice_forms_in_training() -> None:
    forms = [render_choice(MC, rng) for rng in rngs(500)]
    fixed = np.mean([INSTRUCTION in question for question, _ in forms])
    assert 0.06 < fixed < 0.14
    for question, answer in forms:
        assert all(option in question for option in MC.options)
        assert answer in ("B", "b", "2", "II") or answer.endswith("two")
    assert len({question for question, _ in forms}) > 50
    labels = np.mean([answer in ("B", "b", "2", "II") for _, answer in forms])
    assert 0.1 < labels < 0.26  # 90 % x 80 % x 25 %
    blank = Choice(style="s", question="Which?", options=("one", " "), answer=1)
    assert all(answer.strip() not in ("", "one") for rng in rngs(60) for answer in [render_choice(blank, rng)[1]])


def test_a_choice_prompt_has_one_right_answer() -> None:
    families = {form: templates()[f"choice_{form}"] for form in ("label", "option", "text")}
    assert len({text for family in families.values() for text in family} | {INSTRUCTION}) == 1 + 36
    seen: dict[str, str] = {}
    forms = set()
    for rng in rngs(1500):
        question, answer = render_choice(MC, rng)
        assert seen.setdefault(question, answer) == answer
        instruction = question.splitlines()[1]
        if INSTRUCTION not in question:
            form = "text" if answer == "two" else "option" if answer.endswith("two") else "label"
            assert any(instruction.startswith(text) for text in families[form]), question
            forms.add(form)
    assert forms == set(families)


def test_choice_needs_its_answer() -> None:
    with pytest.raises(RejectedError, match="answer 2 of 2 options"):
        ask(Choice(style="s", question="q", options=("a", "b"), answer=2))


def test_conversation() -> None:
    turns = (Turn(role="user", text="a"), Turn(role="assistant", text="b"))
    said = render_messages(Chat(style="text_sft", turns=turns * 2), "sft", None, video=False)
    assert [(m.role, m.content) for m in said] == [("user", "a"), ("assistant", "b")] * 2
    assert (
        render_messages(Chat(style="text_sft", turns=turns), "pretraining", None, video=False)[0].content
        == "text_sft 65: a"
    )
    longer = Chat(style="text_sft", turns=(*turns, turns[0], Turn(role="assistant", text="b" * 1500)))
    asked = render_messages(longer, "pretraining", np.random.default_rng(0), video=False)[0].content
    assert 90 < int(asked.removeprefix("text_sft ").removesuffix(": a")) < 110  # the hint is of the last answer
    with pytest.raises(RejectedError, match="alternate"):
        render_messages(Chat(style="text_sft", turns=turns[1:]), "sft", None, video=False)


def test_turns_become_chatml_with_loss_on_answers() -> None:
    tokenizer = tiny_tokenizer()
    turns = (Turn(role="user", text="a"), Turn(role="assistant", text="bc"), Turn(role="user", text="<|im_end|>"))
    said = render_messages(Chat(style="text_sft", turns=(*turns, turns[1])), "sft", None, video=False)
    branch = encode_messages(tokenizer, said)
    assert tokenizer.decode(branch.ids, skip_special_tokens=False) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nbc<|im_end|>\n"
        "<|im_start|>user\n< |im_end|><|im_end|>\n<|im_start|>assistant\nbc<|im_end|>"
    )
    assert int((branch.ids == tokenizer.eos).sum()) == 4  # the one that the user wrote is text
    assert tokenizer.decode(branch.ids[branch.answer], skip_special_tokens=False) == "bc<|im_end|>" * 2
    with pytest.raises(RejectedError, match="empty answer to 'q'"):
        encode_messages(
            tokenizer, render_messages(Text(style="user_qa", question="q", answer=" "), "sft", None, video=False)
        )


def test_loss_weights() -> None:
    assert token_weight(16, 1) == 0.5  # 2 / sqrt(16): a plain example counts its EOS
    assert token_weight(17, 4) == 0.25  # 2 / sqrt(16) / sqrt(4): a branch does not
    assert token_weight(1, 2) == pytest.approx(2 / 2**0.5)
    tokenizer = tiny_tokenizer()
    branches = [
        encode_messages(
            tokenizer, render_messages(Text(style="user_qa", question="q", answer=a), "sft", None, video=False)
        )
        for a in ("x" * 15, "y" * 3)
    ]
    one, two = (assemble([tokenizer.bos], branches[:n], None) for n in (1, 2))
    assert one["weight"].sum() == pytest.approx(16 * 2 / 4)
    for branch, length in ((1, 15), (2, 3)):
        weights = two["weight"][(two["branch"] == branch) & (two["weight"] > 0)]
        assert weights.tolist() == pytest.approx([2 / length**0.5 / 2**0.5] * (length + 1))
    flat = assemble([tokenizer.bos], branches, 0.2)
    assert set(flat["weight"].tolist()) == {0.0, np.float32(0.2).item()}
    assert flat["branch"].tolist() == [0] + [1] * len(branches[0].ids) + [2] * len(branches[1].ids)


def test_the_styles_that_a_catalog_may_name_are_those_that_are_used() -> None:
    rows = [row for name in ("molmo2", "demo") for row in load_catalog(name).all_rows]
    named = {style for row in rows for _, style in styles_in(row.options)}
    written = {style for style in templates() if not style.startswith("choice_") and style != "track_fps"}
    of_converters = {"ai2_diagram", "ai2_diagram_no_letter", "video_merged_caption"}
    assert named | written | PLAIN_STYLES | of_converters == STYLES
