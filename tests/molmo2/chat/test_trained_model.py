"""A model of ours learns to point to a light in two videos; then a browser asks it on the page of tools/chat.py."""

import os
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import toy_run
import yaml
from chat_pages import centres, converse, wait_for_time
from fork_server import python
from ranks import CPU, free_port
from train_runs import train

from molmo2.processing.points import format_points
from shards.schema import Example, Limits, PointGroup, Points, Source, VideoRef

ROOT = Path(__file__).resolve().parents[3]
QUESTION, LABEL = "Point to the lights.", "lights"
LIMITS = Limits(sequence_length=256, max_crops=8, max_frames=8)
WIDTH, HEIGHT, RATE, NUM = 96, 64, 10, 20
# clip -> where the light is in its first and in its second half, as fractions of width and height
PLACES = {"left": ((0.25, 0.25), (0.75, 0.75)), "right": ((0.75, 0.25), (0.25, 0.75))}
TIMES = (0.5, 1.5)  # seconds of the points: one in each half
# notes every text that the answer has on the page while it is generated
WATCH = """() => {
    window.texts = [];
    new MutationObserver(() => {
        const text = document.querySelector(".assistant")?.innerText;
        if (text && text !== window.texts.at(-1)) window.texts.push(text);
    }).observe(document.querySelector("#conversation"), {subtree: true, childList: true, characterData: true});
}"""


def write_clip(path: Path, places: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """An H.264 video of a light square on a dark ground, which jumps once in the middle."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE), options={"g": "5", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(NUM):
            x, y = places[number * 2 // NUM]
            pixels = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
            left, top = round(x * WIDTH), round(y * HEIGHT)
            pixels[top - 12 : top + 12, left - 18 : left + 18] = (250, 220, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())


def points_of(clip: str) -> Points:
    """The right answer."""
    groups = tuple(PointGroup(at=at, points=(place,)) for at, place in zip(TIMES, PLACES[clip], strict=True))
    return Points(style="video_point_count", label=LABEL, groups=groups, question=QUESTION)


def right_markup(clip: str) -> str:
    return format_points(points_of(clip).groups, LABEL, seconds=True, separator=";")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, their shards, and a run that has learnt both answers."""
    root = tmp_path_factory.mktemp("pointing")
    examples = []
    for row, (name, places) in enumerate(PLACES.items()):
        path = root / f"{name}.mp4"
        write_clip(path, places)
        source, video = Source(file="clips", row=row), VideoRef(path=str(path))
        examples.append(Example(key=name, dataset="toy", source=source, annotations=(points_of(name),), video=video))
    toy_run.build_toy(root, examples=examples, limits=LIMITS)
    settings: dict[str, Any] = {"packs_per_step": 1, "steps": 120, "checkpoint_every": 1000, "residual_dropout": 0.0}
    path = toy_run.write_recipe(root / "pointing.yaml", "pointing", **settings)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= {"sequence_length": 512, "max_crops": 16}
    for group in ("vit", "connector", "llm"):
        recipe["optim"][group] = {"lr": 2e-3, "warmup_steps": 10}
    path.write_text(yaml.safe_dump(recipe))
    train(root, path, ranks=1)
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    """The address of `tools/chat.py --web` with the run's checkpoint."""
    command = [python(), "tools/chat.py", "--checkpoint", "pointing", "--web", "--port", str(free_port())]
    environment = os.environ | CPU | {"MOLMO2_DATA": str(root)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert line.startswith("open http://127.0.0.1:"), line
            yield line.split()[1]
        finally:
            server.kill()


def test_a_trained_model_points_in_a_video(root: Path, url: str, browser: Any, tmp_path: Path) -> None:
    """The answers to one question differ by the video, and each point is drawn at its time and place."""
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    for number, (clip, places) in enumerate(PLACES.items(), 1):
        page.set_input_files("#files", root / f"{clip}.mp4")  # a video starts a new conversation
        page.wait_for_selector("body[data-media='1'] figure video")
        page.evaluate(WATCH)
        converse(page, QUESTION, number)
        assert page.locator(".error").count() == 0
        assert page.inner_text(".user") == QUESTION
        assert page.inner_text(".markup summary") == f"{LABEL}: 2 points"
        shown = page.inner_text(".assistant")
        assert shown.startswith("Counting the") and shown.endswith("shows a total of 2.")
        texts = page.evaluate("window.texts")
        assert "Counting" in texts and len(texts) > 10  # the page grew by a token, or a few, at a time
        page.click(".markup summary")
        assert page.inner_text(".markup code") == right_markup(clip)
        assert page.locator(".times button").all_inner_texts() == [f"{at:.1f} s" for at in TIMES]
        for button, (at, place) in enumerate(zip(TIMES, places, strict=True)):
            page.locator(".times button").nth(button).click()
            wait_for_time(page, at)
            page.wait_for_selector("figure circle")
            assert centres(page) == [place]
        page.screenshot(path=tmp_path / f"{clip}.png")
    assert errors == []
