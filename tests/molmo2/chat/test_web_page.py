"""The chat page: what its server takes and refuses, and a browser that uploads, asks and sees points drawn."""

import base64
import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog_cases import image, video
from programs import why_missing

from molmo2.chat.conversation import answer, conversation
from molmo2.chat.web_page import MAX_BYTES, ChatServer
from molmo2.model.generate import Sampling
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor

IMAGE, VIDEO = image("60x40:red"), video("64x48:30:10")


@pytest.fixture
def served() -> Iterator[Any]:
    """Starts servers; they end with the test."""
    running: list[ChatServer] = []

    def start(said: Any) -> ChatServer:
        server = ChatServer(said, 0)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Answers of a small random model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_demo_tokenizer(["what is there? a field, red and blue, user assistant"] * 4, folder, 512)
    model = Molmo2(PRESETS["tiny"]).init_weights(2).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    settings = ProcessorSettings(preset="tiny", tokenizer_dir=str(folder), stage="eval", num_variants=1)
    processor = build_processor(settings)
    return lambda turns, images, clip: answer(model, processor, conversation(turns, images, clip), Sampling(), 8)


def points_of(turns: Any, images: Any, clip: Path | None) -> Iterator[str]:
    """An answer as a trained model gives it, in pieces that cut the tag."""
    if clip is None:
        yield from ('Here: <points coords="1 1 2', '50 500 2 750 250">the light</points>')
    else:
        yield '<tracks coords="0.5 1 250 250;1.0 1 500 500;2.0 1 750 750">the light</tracks>'


def ask(server: ChatServer, body: Any, **headers: str) -> tuple[int, list[dict[str, Any]]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/ask", data, headers)
    response = connection.getresponse()
    lines = [json.loads(line) for line in response.read().splitlines()]
    connection.close()
    return response.status, lines


def question(text: str = "what is there?", **media: Any) -> dict[str, Any]:
    return {"turns": [{"role": "user", "text": text}], **media}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.slow
def test_answers_of_a_model_stream_and_depend_on_the_media(served: Any, real: Any) -> None:
    server, found = served(real), []
    for media in ({}, {"images": [encoded(IMAGE)]}, {"images": [encoded(IMAGE)] * 2}, {"video": encoded(VIDEO)}):
        status, lines = ask(server, question(**media))
        assert status == 200
        assert len(lines) > 2  # piece by piece
        assert lines[-1] == {"points": []}
        found.append("".join(line["text"] for line in lines[:-1]))
    assert len(set(found)) == 4


def test_points_are_parsed_and_earlier_turns_come_along(served: Any) -> None:
    seen = []

    def said(turns: Any, images: Any, clip: Any) -> Iterator[str]:
        seen.append([(turn.role, turn.text) for turn in turns])
        yield from points_of(turns, images, clip)

    body = {"turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "user", "text": "c"}]}
    _, lines = ask(served(said), body)
    assert seen == [[("user", "a"), ("assistant", "b"), ("user", "c")]]
    assert [(p["at"], p["id"], p["x"], p["y"]) for p in lines[-1]["points"]] == [(1, 1, 0.25, 0.5), (1, 2, 0.75, 0.25)]


@pytest.mark.parametrize(
    ("body", "headers", "status", "match"),
    [
        (question(), {"Host": "evil.example"}, 403, "open http://127.0.0.1"),
        (question(), {"Origin": "http://evil.example"}, 403, "open http://127.0.0.1"),
        (b"{", {}, 400, "not a question"),
        ({"turns": []}, {}, 400, "not a question"),
        ({**question(), "path": "/etc/passwd"}, {}, 400, "not a question"),
        (question(images=["?"]), {}, 400, "not a question: images.0: Data should be valid base64"),
        (question(images=[encoded(b"no image")]), {}, 200, "0.image: not a readable image"),
        (question(video=encoded(b"no video")), {}, 200, "media: video: "),
        (b"x", {"Content-Length": str(MAX_BYTES + 1)}, 413, "at most 256 MiB"),
    ],
)
def test_what_is_refused_is_told(
    served: Any, real: Any, body: Any, headers: dict[str, str], status: int, match: str
) -> None:
    found, lines = ask(served(real), body, **headers)
    assert (found, len(lines)) == (status, 1)
    assert match in lines[0]["error"] and "/tmp" not in lines[0]["error"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if reason := why_missing("chromium"):
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


def converse(page: Any, text: str, number: int) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(f"body[data-answered='{number}']", timeout=60_000)


def test_a_browser_uploads_asks_and_draws(served: Any, browser: Any, tmp_path: Path) -> None:
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served(points_of).url)
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE})
    page.wait_for_selector("body[data-media='1'] figure img")
    converse(page, "point to <b>the light</b>", 1)
    assert "the light</points>" in page.inner_text(".assistant")
    assert page.inner_text(".user") == "point to <b>the light</b>"  # text, never markup
    box = page.locator("figure img").bounding_box()
    drawn = [circle.bounding_box() for circle in page.locator("figure circle").all()]
    centres = [(c["x"] + c["width"] / 2 - box["x"], c["y"] + c["height"] / 2 - box["y"]) for c in drawn]
    places = [(x / box["width"], y / box["height"]) for x, y in centres]
    assert [pytest.approx(place, abs=0.01) for place in places] == [(0.25, 0.5), (0.75, 0.25)]
    page.screenshot(path=tmp_path / "image.png")

    page.set_input_files("#files", {"name": "v.mp4", "mimeType": "video/mp4", "buffer": VIDEO})
    page.wait_for_selector("body[data-media='1'] figure video")
    converse(page, "track it", 2)
    assert page.locator(".times button").all_inner_texts() == ["0.5 s", "1.0 s", "2.0 s"]
    page.locator(".times button").nth(1).click()
    page.wait_for_function("Math.abs(document.querySelector('video').currentTime - 1) < 0.05")
    page.wait_for_selector("figure circle")
    assert page.locator("figure polyline").count() == 1
    page.screenshot(path=tmp_path / "video.png")
    page.click("#reset")
    assert page.locator("figure").count() == 0 and page.locator(".turn").count() == 0
    assert errors == []


def test_a_browser_talks_with_a_real_model(served: Any, real: Any, browser: Any) -> None:
    page = browser.new_page()
    page.goto(served(real).url)
    page.set_input_files("#files", [{"name": f"{i}.png", "mimeType": "image/png", "buffer": IMAGE} for i in range(2)])
    page.wait_for_selector("body[data-media='2'] figure:nth-child(2) img")
    for number in (1, 2):  # the second question carries the first answer
        converse(page, "what is there?", number)
    said = page.locator(".assistant").all_inner_texts()
    assert len(said) == 2 and all(said)
    assert page.locator(".error").count() == 0
