"""A web page to chat with a model: a user uploads images or a video, and points and tracks are drawn on them.

The server has no state: a request has the whole conversation and its media, and the answer is streamed back as JSON
lines. It listens only on this machine, answers one question at a time, and refuses requests from other sites (the names
in Host and Origin must be its own). The page is one file and loads nothing else.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pydantic

from molmo2.pages import fill_template
from molmo2.parallel.agree import write_line
from molmo2.processing.points import parse_points
from shards.schema import Turn

MAX_BYTES = 256 << 20  # maximum size of a request, with media in base64
MAX_TOTAL = 1 << 30  # maximum size of all requests that are read or wait for their answer
Answer = Callable[[Sequence[Turn], Sequence[Path], Path | None], Iterator[str]]


class ChatTurn(pydantic.BaseModel, extra="forbid"):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str = pydantic.Field(min_length=1, max_length=100_000)


class ChatRequest(pydantic.BaseModel, extra="forbid", val_json_bytes="base64"):
    """A conversation that ends with a question, and its media in base64."""

    turns: list[ChatTurn] = pydantic.Field(min_length=1, max_length=1000)
    images: list[bytes] = pydantic.Field(default=[], max_length=16)
    video: bytes | None = None


class ChatServer(ThreadingHTTPServer):
    """Serves the page and answers one question at a time.

    Args:
        answer: (turns, image files, a video file) -> the pieces of an answer.
        port: the port to listen on; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.busy = answer, threading.Lock()
        self.held, self.counting = 0, threading.Lock()  # bytes of all requests in work
        self.names = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}

    @contextmanager
    def room(self, size: int) -> Iterator[bool]:
        """Whether a request of `size` bytes fits beside the others; if so, it counts until the context ends."""
        with self.counting:
            fits = self.held + size <= MAX_TOTAL
            self.held += size if fits else 0
        try:
            yield fits
        finally:
            with self.counting:
                self.held -= size if fits else 0

    @property
    def url(self) -> str:
        """The URL of the page."""
        return f"http://127.0.0.1:{self.server_port}/"


def serve(answer: Answer, port: int) -> None:
    """Serve until the process is interrupted.

    Raises:
        OSError: the port is in use.
    """
    with ChatServer(answer, port) as server:
        write_line(f"open {server.url} (end with Ctrl-C)")
        server.serve_forever()


def lines_of(answer: Answer, question: ChatRequest) -> Iterator[dict[str, Any]]:
    """The lines of a response: {"text": piece} for each piece, then {"points": [...]}, or {"error": sentence}."""
    turns = [Turn(role=turn.role, text=turn.text) for turn in question.turns]
    with tempfile.TemporaryDirectory(prefix="chat-") as folder:
        try:
            images = [_write(Path(folder) / f"{i}.image", data) for i, data in enumerate(question.images)]
            video = None if question.video is None else _write(Path(folder) / "video", question.video)
            text = ""
            for piece in answer(turns, images, video):
                text += piece
                yield {"text": piece}
        except Exception as error:  # decoders raise anything for odd files; the page must hear of it
            said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
            yield {"error": said.replace(f"{folder}/", "")}
            return
    yield {"points": [{"at": p.at, "id": p.id, "x": p.x, "y": p.y} for p in parse_points(text)]}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte after which a connection is closed

    def do_GET(self) -> None:
        if not self._trusted():
            return
        if self.path != "/":
            self._refuse(404, "there is only /")
            return
        page = fill_template("chat/web_page.html.jinja", title="Molmo2").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        self.send_header("Content-Security-Policy", policy + "img-src blob:; media-src blob:")
        self.end_headers()
        self.wfile.write(page)

    def do_POST(self) -> None:
        if not self._trusted():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/ask" or not re.fullmatch(r"[0-9]{1,18}", length):
            self._refuse(404 if self.path != "/ask" else 411, "POST /ask with a Content-Length")
            return
        if int(length) > MAX_BYTES:
            self._refuse(413, f"{int(length) >> 20} MiB, at most {MAX_BYTES >> 20} MiB: use fewer or smaller files")
            return
        with self.server.room(int(length)) as fits:
            if fits:
                self._ask(int(length))
            else:
                self._refuse(503, "other questions with large files are being answered: try again")

    def _ask(self, length: int) -> None:
        try:
            question = ChatRequest.model_validate_json(self.rfile.read(length))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            self._refuse(400, f"not a question: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            with self.server.busy:
                for line in lines_of(self.server.answer, question):
                    data = (json.dumps(line) + "\n").encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:  # the page was closed
            self.close_connection = True

    def _trusted(self) -> bool:
        """Whether Host and Origin are this server's: another site could resolve its name to this machine."""
        origin = self.headers.get("Origin")
        own = {f"http://{name}" for name in self.server.names}
        if self.headers.get("Host") in self.server.names and (origin is None or origin in own):
            return True
        self._refuse(403, f"open {self.server.url} itself")
        return False

    def _refuse(self, code: int, why: str) -> None:
        body = json.dumps({"error": why}).encode()
        self.close_connection = True  # the unread rest of this request must not be parsed as the next one
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log no requests."""
