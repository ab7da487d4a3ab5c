"""The chat page: what its server takes and refuses, and a browser that uploads, asks and sees points drawn."""

import base64
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog_cases import image, video
from chat_pages import centres, converse, wait_for_time

from molmo2.chat.conversation import answer, conversation
from molmo2.chat.web_page import MAX_BYTES, MAX_NEW_TOKENS, AnswerOptions, ChatServer, split_markup
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
        server = ChatServer(said, 0, AnswerOptions(max_new_tokens=8))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small random model and its processor."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_demo_tokenizer(["what is there? a field, red and blue, user assistant"] * 4, folder, 512)
    model = Molmo2(PRESETS["tiny"]).init_weights(2).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    settings = ProcessorSettings(preset="tiny", tokenizer_dir=str(folder), stage="eval", num_variants=1)
    processor = build_processor(settings)
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos] = 0  # so that every answer has the full length
    return model, processor


@pytest.fixture
def real(model: Any) -> Any:
    """Answers of that model."""
    return lambda turns, images, clip, options: answer(
        *model,
        conversation(turns, images, clip),
        Sampling(temperature=options.temperature),
        options.max_new_tokens,
    )


def points_of(turns: Any, images: Any, clip: Path | None, options: AnswerOptions) -> Iterator[str]:
    """An answer as a trained model gives it, in pieces that cut the tag."""
    if "nothing" in turns[-1].text:
        yield "Nothing here."
    elif clip is None:
        yield from ('Here: <points coords="1 1 2', '50 500 2 750 250">the light</poi', "nts>.")
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
        assert len(lines) == 9  # a piece after each of 8 tokens, and what was incomplete at the end
        found.append("".join(line["text"] for line in lines))
    assert len(set(found)) == 4


def test_points_are_parsed_and_earlier_turns_come_along(served: Any) -> None:
    seen = []

    def said(turns: Any, *others: Any) -> Iterator[str]:
        seen.append([(turn.role, turn.text) for turn in turns])
        yield from points_of(turns, *others)

    body = {"turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "user", "text": "c"}]}
    _, lines = ask(served(said), body)
    assert seen == [[("user", "a"), ("assistant", "b"), ("user", "c")]]
    (tag,) = [line for line in lines if "markup" in line]
    assert [(p["at"], p["id"], p["x"], p["y"]) for p in tag["points"]] == [(1, 1, 0.25, 0.5), (1, 2, 0.75, 0.25)]
    assert tag["label"] == "the light"
    assert "".join(line.get("text", "") for line in lines) == "Here: ."


@pytest.mark.parametrize(
    ("body", "headers", "status", "match"),
    [
        (question(), {"Host": "evil.example"}, 403, "open http://127.0.0.1"),
        (question(), {"Origin": "http://evil.example"}, 403, "open http://127.0.0.1"),
        (b"{", {}, 400, "not a question"),
        ({"turns": []}, {}, 400, "not a question"),
        ({**question(), "path": "/etc/passwd"}, {}, 400, "not a question"),
        (question(images=["?"]), {}, 400, "not a question: images.0: Data should be valid base64"),
        (
            question(options={"temperature": 2.1}),
            {},
            400,
            "options.temperature: Input should be less than or equal to 2",
        ),
        (question(options={"temperature": -0.1}), {}, 400, "options.temperature: Input should be greater than or"),
        (b'{"turns": [{"role": "user", "text": "a"}], "options": {"temperature": NaN}}', {}, 400, "not a question"),
        (question(options={"max_new_tokens": 0}), {}, 400, "options.max_new_tokens: Input should be greater than or"),
        (
            question(options={"max_new_tokens": MAX_NEW_TOKENS + 1}),
            {},
            400,
            "options.max_new_tokens: Input should be less",
        ),
        (question(options={"top_k": 1}), {}, 400, "options.top_k"),
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


@pytest.mark.slow
def test_temperature_and_length_of_a_request_hold_for_its_answer(served: Any, model: Any, real: Any) -> None:
    server = served(real)
    tokens = {}
    for name, options in {
        "default": None,
        "short": {"max_new_tokens": 3},
        "drawn": {"temperature": 2.0, "max_new_tokens": 8},
    }.items():
        _, lines = ask(server, question(options=options))
        tokens[name] = len(lines) - 1, "".join(line["text"] for line in lines)
    assert (tokens["default"][0], tokens["short"][0]) == (8, 3)
    assert tokens["default"][1].startswith(tokens["short"][1].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert tokens["drawn"][1] != tokens["default"][1]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a < b <b>c</b> <pointer>", ["a < b <b>c</b> <pointer>"]),
        ('<points coords="1 1 250 500">cat</points> and <points coords="1 1 100 100">dog</points>.',
         [("cat", 1), " and ", ("dog", 1), "."]),
        ('see <points coords="1 1 250 500 2 300 300">ca', ["see ", ("ca", 2)]),  # it reached its length
        ('see <points coords="1 1 250 50', ['see <points coords="1 1 250 50']),  # no point is complete
        ("<points>cat</points>", ["<points>cat</points>"]),
        ("the end <poi", ["the end <poi"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [1, 7, 1000])
def test_markup_is_separated_however_the_pieces_are_cut(text: str, lines: list[Any], length: int) -> None:
    parts: list[Any] = []
    for line in split_markup(text[first : first + length] for first in range(0, len(text), length)):
        if "markup" in line:
            parts.append((line["label"], len(line["points"])))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += line["text"]
        elif line["text"]:
            parts.append(line["text"])
    assert parts == lines


@pytest.fixture
def gated(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A gate before every token after the first, and the number of tokens that were computed behind it."""
    gate, computed, decode = threading.Semaphore(0), [], type(model[0]).decode

    def gated_decode(self: Any, embedded: torch.Tensor, *args: Any, **options: Any) -> Any:
        if embedded.shape[1] == 1:
            assert gate.acquire(timeout=30)
            computed.append(1)
        return decode(self, embedded, *args, **options)

    monkeypatch.setattr(type(model[0]), "decode", gated_decode)
    return gate, computed


def wait_until_free(server: ChatServer) -> None:
    assert server.busy.acquire(timeout=30)
    server.busy.release()


@pytest.mark.slow
def test_no_token_is_computed_after_the_connection_was_closed(served: Any, real: Any, gated: Any) -> None:
    server, (gate, computed) = served(real), gated
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", "/ask", json.dumps(question(options={"max_new_tokens": 100})).encode())
    response = connection.getresponse()
    gate.release(2)
    for _ in range(3):
        assert "text" in json.loads(response.readline())
    response.close()
    connection.close()
    gate.release(1000)
    wait_until_free(server)
    assert len(computed) in {2, 3}  # the third was under way when the connection was closed
    assert ask(server, question())[0] == 200  # the next question is answered


def test_a_browser_uploads_asks_and_draws(served: Any, browser: Any, tmp_path: Path) -> None:
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 900, "height": 800})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served(points_of).url)
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE})
    page.wait_for_selector("body[data-media='1'] figure img")
    converse(page, "point to <b>the light</b>", 1)
    assert page.inner_text(".assistant").split() == "Here: the light: 2 points .".split()
    assert page.inner_text(".user") == "point to <b>the light</b>"  # text, never markup
    assert centres(page) == [(0.25, 0.5), (0.75, 0.25)]
    page.screenshot(path=tmp_path / "image.png")

    page.set_input_files("#files", {"name": "v.mp4", "mimeType": "video/mp4", "buffer": VIDEO})
    page.wait_for_selector("body[data-media='1'] figure video")
    converse(page, "track it", 2)
    assert page.locator(".times button").all_inner_texts() == ["0.5 s", "1.0 s", "2.0 s"]
    page.locator(".times button").nth(1).click()
    wait_for_time(page, 1.0)
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


def test_stop_in_a_browser_ends_the_generation(served: Any, real: Any, browser: Any, gated: Any) -> None:
    server, (gate, computed) = served(real), gated
    page = browser.new_page()
    page.goto(server.url)
    page.fill("#tokens", "100")
    page.fill("#question", "what is there?")
    page.press("#question", "Enter")
    gate.release(2)
    page.wait_for_selector(".assistant:not(:empty)")
    page.click("#stop")
    page.wait_for_selector("body[data-answered='1']")
    while server.busy.locked() and len(computed) < 99:  # a browser closes the connection a moment later
        gate.release()
        time.sleep(0.05)
    gate.release(1000)
    assert len(computed) < 50
    assert page.inner_text(".assistant").endswith("(stopped)") and page.locator(".error").count() == 0
    page.fill("#tokens", "4")
    converse(page, "and then?", 2)  # the conversation goes on with what there is of the answer
    assert page.is_hidden("#stop") and page.is_visible("#ask")


def test_a_browser_sets_temperature_and_length(served: Any, browser: Any) -> None:
    seen = []

    def said(*asked: Any) -> Iterator[str]:
        seen.append(asked[-1])
        yield "yes"

    page = browser.new_page()
    page.goto(served(said).url)
    assert (page.input_value("#temperature"), page.input_value("#tokens")) == ("0.0", "8")  # those of the server
    converse(page, "a", 1)
    page.fill("#temperature", "0.7")
    page.fill("#tokens", "33")
    converse(page, "b", 2)
    assert seen == [AnswerOptions(max_new_tokens=8), AnswerOptions(temperature=0.7, max_new_tokens=33)]
    page.fill("#temperature", "3")
    page.fill("#question", "c")
    page.click("#ask")
    assert page.evaluate("document.querySelector('#temperature').validity.rangeOverflow") and len(seen) == 2


def hand_over(page: Any, event: str, *files: tuple[str, str, bytes]) -> None:
    """Drop or paste files, as a browser reports it: (name, type, bytes) each."""
    page.evaluate(
        """([event, files]) => {
            const data = new DataTransfer();
            for (const [name, type, content] of files)
                data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name, {type}));
            document.body.dispatchEvent(event === "drop"
                ? new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent(event, {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        [event, [[name, kind, encoded(data)] for name, kind, data in files]],
    )


def test_media_are_dropped_and_pasted(served: Any, browser: Any) -> None:
    seen = []

    def said(turns: Any, images: Any, clip: Path | None, _: Any) -> Iterator[str]:
        seen.append(([path.read_bytes() for path in images], clip and clip.read_bytes()))
        yield "yes"

    page, other = browser.new_page(), image("40x60:blue")
    page.goto(served(said).url)
    hand_over(page, "drop", ("a.png", "image/png", IMAGE))
    page.wait_for_selector("body[data-media='1'] figure img")
    converse(page, "one?", 1)
    hand_over(page, "paste", ("b.png", "image/png", other))  # a picture is added, and the conversation goes on
    page.wait_for_selector("body[data-media='2'] figure:nth-child(2) img")
    converse(page, "two?", 2)
    assert page.locator(".user").count() == 2
    hand_over(page, "paste", ("v.mp4", "video/mp4", VIDEO))
    page.wait_for_selector("body[data-media='1'] figure video")
    assert page.locator(".user").count() == 0
    converse(page, "a video?", 3)
    assert seen == [([IMAGE], None), ([IMAGE, other], None), ([], VIDEO)]
    hand_over(page, "drop", ("notes.txt", "text/plain", b"a"))
    assert page.inner_text(".error") == "notes.txt is neither a picture nor a video."
    assert page.locator("figure video").count() == 1


def test_points_stay_and_their_markup_is_shown_on_demand(served: Any, browser: Any) -> None:
    page = browser.new_page()
    page.goto(served(points_of).url)
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": IMAGE})
    page.wait_for_selector("body[data-media='1'] figure img")
    converse(page, "point to the light", 1)
    places = centres(page)
    assert places == [(0.25, 0.5), (0.75, 0.25)]
    converse(page, "nothing?", 2)
    assert centres(page) == places  # they stay
    converse(page, "and again", 3)
    assert centres(page) == places * 2
    fills = [circle.get_attribute("fill") for circle in page.locator("figure circle").all()]
    assert fills[0] == fills[1] != fills[2] == fills[3]
    markup = page.locator(".markup code").first
    assert not markup.is_visible()
    page.locator(".markup summary").first.click()
    assert markup.inner_text() == '<points coords="1 1 250 500 2 750 250">the light</points>'
