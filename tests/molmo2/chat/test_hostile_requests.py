"""Requests and uploads that mean harm: the chat page hears of every error, and the server goes on."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from molmo2.chat import web_page
from molmo2.chat.web_page import AnswerOptions, ChatRequest, ChatServer, lines_of

QUESTION = {"turns": [{"role": "user", "text": "what?"}]}


def failing(error: Exception) -> Any:
    def answer(*_: Any) -> Iterator[str]:
        yield "half "
        raise error

    return answer


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, KeyError, NotImplementedError, MemoryError, OSError])
def test_any_error_of_an_answer_is_told(error: type[Exception]) -> None:
    lines = list(lines_of(failing(error("odd file")), ChatRequest.model_validate(QUESTION), AnswerOptions()))
    assert lines[0] == {"text": "half "} and "odd file" in lines[1]["error"] and len(lines) == 2


@pytest.mark.parametrize("length", ["\u00b2", "-1", "+5", "1_0", "9" * 5000, "0x5", ""])
def test_odd_lengths_are_refused(length: str) -> None:
    server = ChatServer(failing(OSError("unused")), 0, AnswerOptions())
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/ask")
        connection.putheader("Content-Length", length.encode("latin-1"))
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 411 and "Content-Length" in json.loads(response.read())["error"]
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serving() -> Iterator[ChatServer]:
    with ChatServer(lambda *_: iter(["yes"]), 0, AnswerOptions()) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def begun(server: ChatServer, length: int) -> http.client.HTTPConnection:
    """A request of which only the header has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest("POST", "/ask")
    connection.putheader("Content-Length", str(length))
    connection.endheaders()
    return connection


def wait_until_held(server: ChatServer, size: int) -> None:
    until = time.monotonic() + 10
    while server.held != size and time.monotonic() < until:
        time.sleep(0.005)
    assert server.held == size


def test_all_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of any number of requests could hold 256 MiB while it waited for its answer."""
    body = json.dumps(QUESTION).encode()
    monkeypatch.setattr(web_page, "MAX_TOTAL", 10 * len(body))
    with serving() as server:
        waiting = [begun(server, 3 * len(body)) for _ in range(3)]
        wait_until_held(server, 9 * len(body))
        refused = begun(server, 2 * len(body))
        answer = refused.getresponse()
        assert answer.status == 503 and "try again" in json.loads(answer.read())["error"]
        fitting = begun(server, len(body))
        fitting.send(body)
        assert fitting.getresponse().read().startswith(b'{"text": "yes"}')
        for connection in (*waiting, refused, fitting):  # closed without a body
            connection.close()
        wait_until_held(server, 0)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_page._Handler, "timeout", 0.1)
    with serving() as server:
        connection = begun(server, 1000)
        connection.send(b"{")
        wait_until_held(server, 1000)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            connection.getresponse()
        wait_until_held(server, 0)
        connection.close()
