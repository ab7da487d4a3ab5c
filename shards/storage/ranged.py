"""Reads of byte ranges over HTTP: pooled connections, retries within a deadline, and a check of every response.

`shards.storage.s3` reads presigned URLs with it, `shards.storage.web` public files. A refusal is repeated once with a
new location, because a signature or the credentials behind it may have expired.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import urllib3
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential_jitter

from shards.storage.base import UnavailableError, tally

LOG = logging.getLogger(__name__)
DEADLINE = 120.0  # seconds of one read with all its attempts
ATTEMPT = 30.0  # seconds of one attempt, including the body
CONNECT = 10.0  # seconds to connect
PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts; the pause doubles, with jitter
POOL = 64  # connections per process
CHUNK = 1 << 20  # bytes of a body that are read at once
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that are retried
BUSY = frozenset({"SlowDown", "RequestTimeout", "InternalError"})  # codes of S3 that are retried with any status
WHOLE_PLACE = frozenset({"NoSuchBucket", "RepoNotFound", "RevisionNotFound"})  # codes: not only this file is missing
Response: TypeAlias = urllib3.BaseHTTPResponse
T = TypeVar("T")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class TransientError(Exception):
    """An attempt failed and may be retried; `pause`: seconds that the server asks the client to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(f"{reason}, and asks to wait {pause:.0f} s" if pause else reason)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Location:
    """A URL that can be read without redirects, and what made it (`signer`)."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    signer: Any = None


def checked_parts(root: str, name: str) -> list[str]:
    """The parts of a file name.

    Raises:
        ValueError: the name is absolute or leaves the root.
    """
    parts = name.split("/")
    if not all(parts) or ".." in parts or "." in parts:
        raise ValueError(f"{root}: unsafe file name {name!r}: it must be relative and stay below the root")
    return parts


def read_range(
    where: str,
    locate: Callable[[Location | None], Location],
    offset: int,
    length: int | None,
    *,
    remedy: str,
    deadline: float,
) -> bytes:
    """Read a range of a file; every response is checked to be the requested range.

    Args:
        where: the file as the user knows it, for errors.
        locate: returns where to read; its argument is a location that the server refused, or None.
        offset: first byte.
        length: number of bytes; None: up to the end.
        remedy: what a user can do if the server refuses.
        deadline: seconds for all attempts.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: the server refuses access.
        UnavailableError: there was no complete response within the deadline.
    """
    if length == 0:
        return b""
    since = time.monotonic()

    def attempt() -> bytes:
        location = locate(None)
        try:
            return _get(where, location, offset, length, remedy, since + deadline)
        except PermissionError:
            return _get(where, locate(location), offset, length, remedy, since + deadline)

    return retried(where, attempt, deadline)


def retried(where: str, attempt: Callable[[], T], deadline: float) -> T:
    """Call `attempt` until it raises no `TransientError`.

    Raises:
        UnavailableError: it still fails at the deadline, or the server asks to wait longer than that.
    """
    since = time.monotonic()
    attempts = Retrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_before_delay(deadline),
        wait=_wait,
        before_sleep=functools.partial(_log_retry, where),
        reraise=True,
    )
    try:
        return attempts(attempt)
    except TransientError as error:
        raise UnavailableError(
            f"{where}: no answer in {time.monotonic() - since:.0f} s: {error}; "
            "check the endpoint and the network, then start again: the run resumes where it was"
        ) from None


@contextmanager
def request(location: Location, first: int, last: int | None, end: float, redirects: int = 0) -> Iterator[Response]:
    """Ask for a range; the body is not read yet. Failures of the connection become `TransientError`."""
    seconds = max(0.1, min(ATTEMPT, end - time.monotonic()))
    try:
        response = connections(os.getpid(), _proxy_of(*urlsplit(location.url)[:2])).request(
            "GET",
            location.url,
            headers={**location.headers, "Range": f"bytes={first}-{'' if last is None else last}"},
            preload_content=False,
            redirect=redirects > 0,
            retries=urllib3.Retry(total=None, connect=0, read=0, other=0, redirect=redirects) if redirects else False,
            timeout=urllib3.Timeout(connect=CONNECT, read=seconds),
        )
        try:
            yield response
        finally:
            if not response.closed:  # the rest of the body must not reach the next request on this connection
                response.close()
            response.release_conn()
    except (urllib3.exceptions.HTTPError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        cause = getattr(error, "reason", error) if isinstance(error, urllib3.exceptions.MaxRetryError) else error
        _raise_if_lasting(cause, location.url)
        raise TransientError(f"{type(cause).__name__}: {cause}") from None


def _raise_if_lasting(error: BaseException, url: str) -> None:
    """Raise what another attempt would not change: a name that does not exist, a certificate that is not trusted."""
    host, found = urlsplit(url).netloc, error.__cause__
    if isinstance(found, socket.gaierror) and found.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        raise UnavailableError(
            f"there is no host {host} ({found.strerror}); check the address of the endpoint"
        ) from None
    inner = error.args[0] if error.args else None
    if isinstance(inner, ssl.SSLCertVerificationError):
        raise UnavailableError(
            f"the certificate of {host} is not trusted ({inner.verify_message}); check the address of the endpoint, or "
            "name the file of its authority in SSL_CERT_FILE"
        ) from None


def check_status(response: Response, where: str, remedy: str) -> None:
    """Raise the error that belongs to a status other than 200, 206 and 416."""
    status = response.status
    if status in (200, 206, 416):
        return
    text = response.read(2000, decode_content=True).decode("utf-8", "replace")
    match = re.search(r"<Code>(\w+)</Code>", text)
    code = match[1] if match else response.headers.get("X-Error-Code", f"status {status}")
    if status in TRANSIENT or code in BUSY:
        raise TransientError(f"{code} ({status})", _retry_after(response))
    if status in (404, 410) and code not in WHOLE_PLACE:
        raise FileNotFoundError(2, f"no such object ({code})", where)
    raise PermissionError(13, f"the store refuses: {code} ({status}); {remedy}", where)


def _get(where: str, location: Location, offset: int, length: int | None, remedy: str, end: float) -> bytes:
    """One attempt at a ranged GET."""
    until = min(end, time.monotonic() + ATTEMPT)
    with request(location, offset, None if length is None else offset + length - 1, end) as response:
        check_status(response, where, remedy)
        if response.status == 416:  # the range begins after the end of the file
            response.read(CHUNK)
            return b""
        return whole_body(response, offset, length, until)


def whole_body(response: Response, offset: int, length: int | None, until: float) -> bytes:
    """Read the body of a response: `length` bytes from `offset` on, fewer if the object ends earlier."""
    start, expected = 0, None
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != offset:
            raise TransientError(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')!r}")
        expected = int(match[2]) + 1 - offset
        total = None if match[3] == "*" else int(match[3])
        if length is not None and expected != (length if total is None else min(length, total - offset)):
            raise TransientError(f"asked for {length} bytes from {offset}, got {match[0]!r}")
    else:  # a server without range support sends the whole object
        start = offset
        expected = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
    chunks, received = [], 0
    while chunk := response.read1(CHUNK):
        end = None if length is None else max(start + length - received, 0)
        chunks.append(chunk[max(start - received, 0) : end])  # the rest of a whole object is not kept
        received += len(chunk)
        if expected is not None and received > expected:
            raise TransientError(f"more than the {expected} bytes that were announced")
        if time.monotonic() > until:
            raise TransientError(f"{received} bytes in {ATTEMPT:.0f} s: too slow")
    if expected is not None and received != expected:
        raise TransientError(f"{received} bytes of a body of {expected}")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _retry_after(response: Response) -> float:
    """Seconds of a Retry-After header, which holds a number or a date; 0 if there is none."""
    try:
        return urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    except urllib3.exceptions.InvalidHeader:
        return 0.0


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    pause = error.pause if isinstance(error, TransientError) else 0.0
    return max(pause, wait_exponential_jitter(multiplier=PAUSE, max=LONGEST_PAUSE, jitter=PAUSE)(state))


def _log_retry(where: str, state: RetryCallState) -> None:
    tally("retries")
    error = state.outcome.exception() if state.outcome else None
    LOG.warning("%s: attempt %d failed: %s; retry in %.1f s", where, state.attempt_number, error, state.upcoming_sleep)


@functools.lru_cache(maxsize=256)
def _proxy_of(scheme: str, netloc: str) -> str | None:
    """The proxy for a host by the variables `https_proxy`, `http_proxy` and `no_proxy`."""
    return None if urllib.request.proxy_bypass(netloc) else urllib.request.getproxies().get(scheme)


# Connections do not survive a fork: each process has its own.
@functools.lru_cache(maxsize=4)
def connections(pid: int, proxy: str | None) -> urllib3.PoolManager:
    """The pool of this process."""
    if proxy is not None:
        return urllib3.ProxyManager(proxy, num_pools=8, maxsize=POOL)
    return urllib3.PoolManager(num_pools=8, maxsize=POOL)
