"""Chat in the terminal: questions about text, images and a video, several turns, errors in one line."""

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog_cases import image, video
from fork_server import python

from molmo2.export.card import About
from molmo2.export.model import export_model
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.new_tokenizer import train_demo_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random model and media."""
    root = tmp_path_factory.mktemp("chat")
    train_demo_tokenizer(["what is there? a field, red and blue, user assistant"] * 4, root / "tokenizer", 512)
    model = Molmo2(PRESETS["tiny"]).init_weights(2)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    export_model(model.config, dict(model.state_dict()), root / "tokenizer", root / "model", About(origin={"run": "t"}))
    (root / "a.png").write_bytes(image("60x40:red"))
    (root / "b.png").write_bytes(image("40x60:blue"))
    (root / "v.mp4").write_bytes(video("64x48:30:10"))
    return root


def chat(folder: Path, questions: str, *options: Any) -> Any:
    command = [python(), "tools/chat.py", "--checkpoint", folder / "model", "--max-new-tokens", "12", *options]
    return subprocess.run(command, cwd=ROOT, input=questions, capture_output=True, text=True, check=False)


def answers(output: str) -> list[str]:
    return [part.strip() for part in output.split("> ")[1:-1]]


@pytest.mark.slow
def test_answers_depend_on_what_is_shown(folder: Path) -> None:
    media = [[], ["--image", folder / "a.png"], ["--image", folder / "a.png", folder / "b.png"],
             ["--video", folder / "v.mp4"]]  # fmt: skip
    found = []
    for shown in media:
        run = chat(folder, "what is there?\n", *shown)
        assert run.returncode == 0, run.stderr
        found += answers(run.stdout)
    assert len(found) == len(set(found)) == 4


@pytest.mark.slow
def test_a_conversation_goes_on(folder: Path) -> None:
    both = answers(chat(folder, "what is there?\nand then?\n\nnot asked\n").stdout)
    alone = answers(chat(folder, "and then?\n").stdout)
    assert len(both) == 2
    assert both[1] != alone[0]
    assert both[0] == answers(chat(folder, "what is there?\n").stdout)[0]


@pytest.mark.slow
def test_drawn_answers_follow_the_seed(folder: Path) -> None:
    drawn = [
        answers(chat(folder, "red?\n", "--temperature", "1", "--top-p", "0.9", "--seed", seed).stdout)[0]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_points_of_an_answer_are_listed() -> None:
    lines = runpy.run_path(str(ROOT / "tools/chat.py"))["point_lines"]
    text = 'Here: <points coords="1 1 250 500 2 999 000">cats</points>'
    assert lines(text, False) == [
        "  point 1 in image 1: x 0.250, y 0.500\n",
        "  point 2 in image 1: x 0.999, y 0.000\n",
    ]
    assert lines('<points coords="1.5 1 250 500">cats</points>', True) == ["  point 1 at 1.5 s: x 0.250, y 0.500\n"]
    assert lines("none", False) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image", "none.png"], "chat: no such file: none.png"),
        (["--temperature", "-1"], "chat: temperature -1.0 and top_p 1.0"),
        (["--video", "setup.cfg"], "chat: media: setup.cfg: "),
        (["--image", "setup.cfg"], "chat: media: setup.cfg: not a readable image"),
        (["--web", "--temperature", "3"], "chat: --web: temperature: Input should be less than or equal to 2"),
    ],
)
def test_mistakes_are_told_in_one_line(folder: Path, options: list[str], told: str) -> None:
    run = chat(folder, "red?\n", *options)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(told)
    assert ">" not in run.stdout  # no question was asked for
    assert "Traceback" not in run.stderr
