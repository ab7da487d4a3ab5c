"""Download of untrusted URLs: with limits and retries, respecting Retry-After, and never from a private network.

This is the only place in the project that follows untrusted URLs. Every redirect is a new, checked connection, so
proxies are not used. Content encodings are not requested, and connections are not reused: the images of a dataset are
on very many hosts.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import os
import re
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from shards.download.connect import FetchError, FetchLimits, connect, host_of, reason_of

USER_AGENT = "nanoMolmo2-download/0.1 (dataset download; Python http.client)"
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 8
CHUNK = 1 << 20
_SAFE = "/%:@!$&'()*+,;=?~-._[]"  # characters of a URL that are not escaped

T = TypeVar("T")


IMAGE_LIMITS = FetchLimits()
ARCHIVE_LIMITS = FetchLimits(max_bytes=1 << 40, max_seconds=48 * 3600.0, stall=120.0, attempts=8)


@dataclass(slots=True)
class HostPauses:
    """The time until which each host asked for no requests, shared by all threads; `stop` ends all pauses."""

    until: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stop: threading.Event = field(default_factory=threading.Event)

    def sleep(self, seconds: float) -> None:
        """Sleep, but return early if `stop` is set."""
        self.stop.wait(seconds)

    def wait(self, host: str) -> None:
        """Sleep until requests to the host are allowed again."""
        while (left := self.until[host] - time.monotonic()) > 0 and not self.stop.wait(left):
            pass

    def ask(self, host: str, seconds: float) -> None:
        """Record that a host asked for a pause of so many seconds."""
        self.until[host] = max(self.until[host], time.monotonic() + seconds)


def fetch_bytes(url: str, limits: FetchLimits, pauses: HostPauses | None = None) -> bytes:
    """Fetch the body of a URL into memory.

    Raises:
        FetchError: all attempts failed: the URL is forbidden, missing, too large or too slow, or the connection broke.
    """
    pauses = pauses or HostPauses()

    def attempt() -> bytes:
        target = io.BytesIO()
        pauses.wait(host_of(url))
        with _response(url, limits) as response:
            _check_status(response)
            _copy(response, target, limits.max_bytes)
        return target.getvalue()

    return _retry(url, limits, pauses, attempt)


def fetch_file(url: str, path: Path, limits: FetchLimits = ARCHIVE_LIMITS) -> None:
    """Fetch a URL into a file; `PATH.part` of an earlier run is resumed if the server still has that version.

    Raises:
        FetchError: see `fetch_bytes`; the part is kept for the next run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, facts = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")

    def attempt() -> None:
        known = _known_part(part, facts, url)
        headers = {"Range": f"bytes={known[0]}-", "If-Range": known[1]} if known else {}
        with _response(url, limits, headers) as response:
            if response.status == 416:  # the part is of another version, or complete: start again
                facts.unlink(missing_ok=True)
                raise FetchError("http 416", transient=True)
            _check_status(response)
            begins = known[0] if known and response.status == 206 else 0
            if response.status == 206 and not (response.getheader("Content-Range") or "").startswith(
                f"bytes {begins}-"
            ):
                facts.unlink(missing_ok=True)
                raise FetchError("a range that was not asked for", transient=True)
            if not begins:
                part.write_bytes(b"")
                facts.write_text(json.dumps({"url": url, "validator": _validator(response)}))
            with part.open("ab") as target:
                _copy(response, target, limits.max_bytes - begins)
                target.flush()
                os.fsync(target.fileno())

    _retry(url, limits, HostPauses(), attempt)
    part.replace(path)
    facts.unlink(missing_ok=True)


def remote_size(url: str, limits: FetchLimits = ARCHIVE_LIMITS) -> int | None:
    """Size of a file in bytes by a HEAD request; None if the server does not report it."""
    with suppress(FetchError), _response(url, limits, method="HEAD") as response:
        _check_status(response)
        length = response.getheader("Content-Length") or ""
        return int(length) if length.isdigit() else None
    return None


def _retry(url: str, limits: FetchLimits, pauses: HostPauses, attempt: Callable[[], T]) -> T:
    """Run `attempt` until it succeeds, fails permanently, or has failed `limits.attempts` times."""
    backoff = wait_exponential(limits.first_pause, limits.longest_pause) + wait_random(0, limits.first_pause)

    def again(error: BaseException) -> bool:
        retryable = isinstance(error, FetchError) and error.transient and error.pause <= limits.longest_pause
        return retryable and not pauses.stop.is_set()

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        pause = error.pause if isinstance(error, FetchError) else 0.0
        if pause:
            pauses.ask(host_of(url), pause)
        return max(pause, backoff(state))

    retrying = Retrying(
        retry=retry_if_exception(again),
        stop=stop_after_attempt(limits.attempts),
        wait=wait,
        sleep=pauses.sleep,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except FetchError as error:
        error.attempts = retrying.statistics.get("attempt_number", 1)
        raise


@contextmanager
def _response(
    url: str, limits: FetchLimits, headers: dict[str, str] | None = None, method: str = "GET"
) -> Iterator[http.client.HTTPResponse]:
    """The server's response after all redirects. A watchdog timer shuts the connection down at the deadline."""
    ends = time.monotonic() + limits.max_seconds
    late = threading.Event()
    for _ in range(MAX_REDIRECTS + 1):
        connection = connect(url, limits, ends)
        watch = threading.Timer(max(ends - time.monotonic(), 0.0), _cut, (connection.sock, late))
        watch.daemon = True
        response = None
        watch.start()
        try:
            parts = urlsplit(url)
            target = quote(parts.path or "/", safe=_SAFE) + (
                f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
            )
            connection.request(
                method,
                target,
                headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Connection": "close", **(headers or {})},
            )
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status not in REDIRECTS or not location:
                yield response
                if late.is_set():  # a body without Content-Length ends like a whole one when it is cut
                    raise TimeoutError
                return
            url = urljoin(url, location)
        except ValueError:  # raised by urljoin and http.client
            raise FetchError("not a URL") from None
        except (OSError, http.client.HTTPException) as error:
            reason = f"not fetched within {limits.max_seconds:g} s" if late.is_set() else reason_of(error)
            raise FetchError(reason, transient=not isinstance(error, ssl.SSLCertVerificationError)) from None
        finally:
            watch.cancel()
            if response is not None:
                response.close()
            connection.close()
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _cut(stream: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


def _check_status(response: http.client.HTTPResponse) -> None:
    if response.status not in {200, 206}:
        transient = response.status in TRANSIENT
        pause = _seconds(response.getheader("Retry-After")) if transient else 0.0
        raise FetchError(f"http {response.status}", transient=transient, pause=pause)


def _seconds(retry_after: str | None) -> float:
    """Seconds that a Retry-After header asks for; the header holds a number or a date."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}\s*", retry_after):
        return float(retry_after)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _copy(response: http.client.HTTPResponse, target: IO[bytes], max_bytes: int) -> None:
    """Copy the whole body; raises if it is longer than `max_bytes` or shorter than its Content-Length."""
    too_large = FetchError(f"larger than {max_bytes} bytes")
    if (response.length or 0) > max_bytes:
        raise too_large
    done = 0
    while chunk := response.read1(CHUNK):
        done += len(chunk)
        if done > max_bytes:
            raise too_large
        target.write(chunk)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def _known_part(part: Path, facts: Path, url: str) -> tuple[int, str] | None:
    """Length and validator (version) of an unfinished file, or None if it cannot be resumed."""
    try:
        known = json.loads(facts.read_text())
        size = part.stat().st_size
    except (OSError, ValueError):
        return None
    return (size, known["validator"]) if known.get("url") == url and known.get("validator") and size else None


def _validator(response: http.client.HTTPResponse) -> str | None:
    """A strong ETag, or else the Last-Modified date."""
    etag = response.getheader("ETag")
    return etag if etag and not etag.startswith("W/") else response.getheader("Last-Modified")
