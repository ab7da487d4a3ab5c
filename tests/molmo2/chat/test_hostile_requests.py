"""Requests and uploads that mean harm: the chat page hears of every error, and the server goes on."""

import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

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
