"""A web page to chat with a model: a user uploads images or a video, and points and tracks are drawn on them.

The server has no state: a request has the whole conversation and its media, and the answer is streamed back as JSON
lines. Its generation ends when the page closes the connection, which is what the page's Stop does. The server listens
only on this machine, answers one question at a time, and refuses requests from other sites (the names in Host and
Origin must be its own). The page is one file and loads nothing else.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
MAX_TEMPERATURE, MAX_NEW_TOKENS = 2.0, 16384
MARKUP = re.compile(r"<(points|tracks)\b[^<>]*>(?P<label>[^<>]*)</\1>")
MARKUP_START = re.compile(r"<(points|tracks)\b")
MARKUP_NAMES = ("<points", "<tracks")


class AnswerOptions(pydantic.BaseModel, extra="forbid"):
    """How an answer is generated: the temperature of the sampling (0: the most likely answer) and the most tokens."""

    temperature: float = pydantic.Field(default=0.0, ge=0, le=MAX_TEMPERATURE)
    max_new_tokens: int = pydantic.Field(default=512, ge=1, le=MAX_NEW_TOKENS)


Answer = Callable[[Sequence[Turn], Sequence[Path], Path | None, AnswerOptions], Iterator[str]]


class ChatTurn(pydantic.BaseModel, extra="forbid"):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    text: str = pydantic.Field(min_length=1, max_length=100_000)


class ChatRequest(pydantic.BaseModel, extra="forbid", val_json_bytes="base64"):
    """A conversation that ends with a question, and its media in base64. Without options, those of the server hold."""

    turns: list[ChatTurn] = pydantic.Field(min_length=1, max_length=1000)
    images: list[bytes] = pydantic.Field(default=[], max_length=16)
    video: bytes | None = None
    options: AnswerOptions | None = None


class ChatServer(ThreadingHTTPServer):
    """Serves the page and answers one question at a time.

    Args:
        answer: (turns, image files, a video file, options) -> the pieces of an answer.
        port: the port to listen on; 0 takes a free one.
        options: what the page's controls show first.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, port: int, options: AnswerOptions) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.options, self.busy = answer, options, threading.Lock()
        self.held, self.counting = 0, threading.Lock()  # bytes of all requests in work
        self.names = {f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")}

    @contextlib.contextmanager
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


def serve(answer: Answer, port: int, options: AnswerOptions) -> None:
    """Serve until the process is interrupted.

    Raises:
        OSError: the port is in use.
    """
    with ChatServer(answer, port, options) as server:
        write_line(f"open {server.url} (end with Ctrl-C)")
        server.serve_forever()


def lines_of(answer: Answer, question: ChatRequest, defaults: AnswerOptions) -> Generator[dict[str, Any]]:
    """The lines of a response: those of `split_markup`, and {"error": sentence} if the answer fails."""
    turns = [Turn(role=turn.role, text=turn.text) for turn in question.turns]
    with tempfile.TemporaryDirectory(prefix="chat-") as folder:
        try:
            images = [_write(Path(folder) / f"{i}.image", data) for i, data in enumerate(question.images)]
            video = None if question.video is None else _write(Path(folder) / "video", question.video)
            yield from split_markup(answer(turns, images, video, question.options or defaults))
        except Exception as error:  # decoders raise anything for odd files; the page must hear of it
            said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
            yield {"error": said.replace(f"{folder}/", "")}


def split_markup(pieces: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Separate the points and tracks of a streamed answer from its text.

    Yields {"text": piece}, and for each tag, as soon as it is complete, {"markup": the tag, "label": its label,
    "points": [...]}. Every piece gives at least one line, so that the reader can stop between any two pieces.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while (start := rest.find("<", start)) >= 0:
            if tag := MARKUP.match(rest, start):
                yield {"text": rest[:start]}
                yield _markup(tag[0], tag["label"])
                rest, start = rest[tag.end() :], 0
            elif MARKUP_START.match(rest, start) or rest[start:] in {
                name[: len(rest) - start] for name in MARKUP_NAMES
            }:
                break  # more of the tag is to come
            else:
                start += 1
        complete = len(rest) if start < 0 else start
        yield {"text": rest[:complete]}
        rest = rest[complete:]
    if rest:  # the answer ended inside a tag
        yield _markup(rest, rest.partition(">")[2].partition("<")[0])


def _markup(tag: str, label: str) -> dict[str, Any]:
    points = [{"at": p.at, "id": p.id, "x": p.x, "y": p.y} for p in parse_points(tag)]
    return {"markup": tag, "label": label.strip(), "points": points} if points else {"text": tag}


def first_problem(error: pydantic.ValidationError) -> str:
    """The first of the problems, and where it is."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


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
        limits = {"most_temperature": MAX_TEMPERATURE, "most_tokens": MAX_NEW_TOKENS}
        page = fill_template("chat/web_page.html.jinja", title="Molmo2", options=self.server.options, **limits).encode()
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
            self._refuse(400, f"not a question: {first_problem(error)}")
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(question)
        except ConnectionError:  # the page was closed
            self.close_connection = True

    def _stream(self, question: ChatRequest) -> None:
        """Write the answer; no further piece of it is made once the page has closed the connection."""
        lines = lines_of(self.server.answer, question, self.server.options)
        with self.server.busy, contextlib.closing(lines):
            while not self._closed_by_page():
                line = next(lines, None)
                if line is None:
                    self.wfile.write(b"0\r\n\r\n")
                    return
                data = (json.dumps(line) + "\n").encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.close_connection = True

    def _closed_by_page(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

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
