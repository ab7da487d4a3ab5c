"""A web server on loopback with every fault that a download meets. Paths say what happens.

/image/N        a small PNG; /slow/N the same after a pause, /busy/N after a 503 with Retry-After
/status/N       that status; /drip a body that never ends; /endless a header that never ends
/cut            half of the promised body; /big more than anybody wants; /bomb a PNG header of 60,000 x 60,000
/loop           redirects to itself; /to/URL redirects there; /file/NAME a file of `Web.files`, with ranges
"""

import contextlib
import io
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest


def png(number: int) -> bytes:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    target = io.BytesIO()
    PIL.Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def bomb() -> bytes:
    """A PNG that claims 3.6 billion pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"")]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


class Web(ThreadingHTTPServer):
    """The server. `asked` counts requests by path, `most` is the largest number of them at one time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.cuts: list[int] = []  # the next answers of /file end after so many bytes
        self.gone: set[str] = set()  # paths that answer 404 until they are taken out
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Web

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""

    def do_GET(self) -> None:
        web = self.server
        with web.lock:
            web.asked[self.path] += 1
            web.agents.add(self.headers["User-Agent"])
            web.now += 1
            web.most = max(web.most, web.now)
        try:
            _, kind, *rest = self.path.split("/", 2)
            getattr(self, kind if self.path not in web.gone else "status")(rest[0] if rest else "404")
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with web.lock:
                web.now -= 1

    do_HEAD = do_GET

    def reply(self, body: bytes, status: int = 200, promised: int | None = None, **headers: str) -> None:
        """An answer; `promised`: another length than the body has."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def image(self, number: str) -> None:
        self.reply(png(int(number)))

    def slow(self, number: str) -> None:
        time.sleep(0.05)
        self.reply(png(int(number)))

    def busy(self, number: str) -> None:
        if self.server.asked[self.path] == 1:
            self.reply(b"", 503, Retry_After="1")
        else:
            self.reply(png(int(number)))

    def status(self, code: str) -> None:
        self.reply(b"", int(code) if code.isdigit() and len(code) == 3 else 404)

    def drip(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        for _i in range(500):
            self.wfile.write(b".")
            time.sleep(0.02)

    def endless(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Endless: ")
        for _i in range(500):
            self.wfile.write(b".")
            time.sleep(0.02)

    def cut(self, _: str) -> None:
        self.reply(png(0)[:40], promised=4000)

    def big(self, _: str) -> None:
        self.send_response(200)
        self.end_headers()
        for _i in range(64):
            self.wfile.write(bytes(1 << 16))

    def bomb(self, _: str) -> None:
        self.reply(bomb())

    def text(self, _: str) -> None:
        self.reply(b"<html>no longer here</html>")

    def loop(self, _: str) -> None:
        self.reply(b"", 302, Location=self.path)

    def to(self, url: str) -> None:
        self.reply(b"", 302, Location=url)

    def later(self, _: str) -> None:
        self.reply(b"", 429, Retry_After="86400")

    def file(self, name: str) -> None:
        data = self.server.files[name]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        tag = f'"{zlib.crc32(data)}"'
        start = int(asked[1]) if asked and self.headers.get("If-Range") == tag else 0
        if asked:
            self.server.ranges.append(asked[0])
        more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        body = data[start:]
        if self.server.cuts and self.command == "GET":
            short = body[: self.server.cuts.pop(0)]
            self.reply(short, 206 if start else 200, promised=len(body), ETag=tag, **more)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.reply(body, 206 if start else 200, ETag=tag, **more)


@contextlib.contextmanager
def web_server() -> Iterator[Web]:
    """A server that runs while the block does."""
    web = Web()
    thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


def untrusted_certificate(folder: Path) -> ssl.SSLContext:
    """The TLS context of a server whose certificate nobody has signed but the server itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    names = ["-subj", "/CN=127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context
