"""An S3 bucket as a `shards.storage.base.Storage`, on any S3-compatible endpoint.

Credentials, region and endpoint are found as in every S3 client: `AWS_*` variables, `~/.aws`, instance roles. Ranges
are read with pooled GETs on presigned URLs: this module controls the whole deadline, and a read takes a fraction of
the CPU time of boto3's `get_object`. All other requests use boto3.

Caching samples on disk is `shards.stream.cache`. Training never lists a bucket.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import urllib3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential_jitter

from shards.storage.base import UnavailableError, tally

LOG = logging.getLogger(__name__)
DEADLINE = 120.0  # seconds of one read with all its attempts
ATTEMPT = 30.0  # seconds of one attempt, including the body
ATTEMPTS = 8  # attempts of a request that is not a read
CONNECT = 10.0  # seconds to connect
PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts; the pause doubles, with jitter
POOL = 64  # connections per process
PRESIGNED = 900  # seconds that a presigned URL is used; it is valid twice as long
CHUNK = 1 << 20  # bytes of a body that are read at once
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that are retried
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _TransientError(Exception):
    """An attempt failed and may be retried; `pause`: seconds that the server asks the client to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class S3Storage:
    """A prefix of a bucket, `s3://bucket/prefix`. It holds no connection, so it can be pickled to workers."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self.bucket, _, self.prefix = self.root.removeprefix("s3://").partition("/")
        self.deadline = DEADLINE
        if not self.bucket:
            raise ValueError(f"{url}: no bucket in it; write s3://bucket/prefix")

    def key(self, name: str) -> str:
        """The object key of a file.

        Raises:
            ValueError: the name is absolute or leaves the root.
        """
        parts = name.split("/")
        if not all(parts) or ".." in parts or "." in parts:
            raise ValueError(f"{self.root}: unsafe file name {name!r}: it must be relative and stay below the root")
        return "/".join([self.prefix, *parts] if self.prefix else parts)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `storage.Storage.read`. Every response is checked to be the requested range.

        Raises:
            FileNotFoundError: the object does not exist.
            PermissionError: the bucket refuses access.
            UnavailableError: there was no complete response within the deadline.
        """
        key, since = self.key(name), time.monotonic()
        if length == 0:
            return b""
        end = since + self.deadline
        attempts = Retrying(
            retry=retry_if_exception_type(_TransientError),
            stop=stop_before_delay(self.deadline),
            wait=_wait,
            before_sleep=functools.partial(_log_retry, f"{self.root}/{name}"),
            reraise=True,
        )
        try:
            try:
                return attempts(self._get, key, offset, length, end)
            except PermissionError:  # the credentials may have been renewed since the URL was signed
                _presigned.cache_clear()
                return attempts(self._get, key, offset, length, end)
        except _TransientError as error:
            raise UnavailableError(
                f"{self.root}/{name}: no answer in {time.monotonic() - since:.0f} s: {error}; "
                "check the endpoint and the network, then start again: the run resumes where it was"
            ) from None

    def _get(self, key: str, offset: int, length: int | None, end: float) -> bytes:
        """One attempt at a ranged GET."""
        until = min(end, time.monotonic() + ATTEMPT)
        last = "" if length is None else str(offset + length - 1)
        try:
            response = _connections(os.getpid()).request(
                "GET",
                _presigned(os.getpid(), self.bucket, key, int(time.monotonic() / PRESIGNED)),
                headers={"Range": f"bytes={offset}-{last}"},
                preload_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=CONNECT, read=max(0.1, min(ATTEMPT, until - time.monotonic()))),
            )
            try:
                return self._body(response, key, offset, length, until)
            except BaseException:
                response.close()  # the rest of the body must not reach the next request on this connection
                raise
            finally:
                response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            raise _TransientError(f"{type(error).__name__}: {error}") from None

    def _body(
        self, response: urllib3.BaseHTTPResponse, key: str, offset: int, length: int | None, until: float
    ) -> bytes:
        where = f"s3://{self.bucket}/{key}"
        status = response.status
        if status == 416:  # the range begins after the end of the object
            return b""
        if status in (200, 206):
            return _whole_body(response, offset, length, until)
        text = response.read(2000, decode_content=True).decode("utf-8", "replace")
        match = re.search(r"<Code>(\w+)</Code>", text)
        code = match[1] if match else f"status {status}"
        if status in TRANSIENT or code in ("SlowDown", "RequestTimeout", "InternalError"):
            raise _TransientError(f"{code} ({status})", _retry_after(response))
        if status == 404 and code != "NoSuchBucket":
            raise FileNotFoundError(2, f"no such object ({code})", where)
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, the region and the bucket's policy"
        raise PermissionError(13, f"the store refuses: {code} ({status}); {remedy}", where)

    def write(self, name: str, data: bytes) -> None:
        """See `storage.Storage.write`; a put of an object is atomic."""
        with self._errors(name):
            _client(os.getpid()).put_object(Bucket=self.bucket, Key=self.key(name), Body=data)

    def create(self, name: str, data: bytes) -> bool:
        """See `storage.Storage.create`; a conditional put that fails if the object exists."""
        with self._errors(name):
            try:
                _client(os.getpid()).put_object(Bucket=self.bucket, Key=self.key(name), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):  # it exists or is being made
                    return False
                raise
        return True

    def publish(self, path: Path, name: str) -> None:
        """See `storage.Storage.publish`; large files are uploaded in parts, and the local file is removed afterwards.

        The client sends a checksum of every part, and the size of the object is compared at the end.
        """
        with self._errors(name):
            _client(os.getpid()).upload_file(str(path), self.bucket, self.key(name))
        if (size := self.size(name)) != path.stat().st_size:
            raise UnavailableError(
                f"{self.root}/{name}: {size} bytes in the bucket after an upload of {path.stat().st_size}; run again"
            )
        path.unlink()

    def size(self, name: str) -> int | None:
        """See `storage.Storage.size`."""
        try:
            with self._errors(name):
                head = _client(os.getpid()).head_object(Bucket=self.bucket, Key=self.key(name))
        except FileNotFoundError:
            return None
        return int(head["ContentLength"])

    def remove(self, name: str) -> None:
        """See `storage.Storage.remove`."""
        with self._errors(name):
            _client(os.getpid()).delete_object(Bucket=self.bucket, Key=self.key(name))

    def list(self, suffix: str = "") -> list[str]:
        """See `storage.Storage.list`."""
        prefix = f"{self.prefix}/" if self.prefix else ""
        with self._errors(""):
            pages = _client(os.getpid()).get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            names = [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]
        visible = (name for name in names if not name.rsplit("/", 1)[-1].startswith("."))
        return sorted(name for name in visible if name.endswith(suffix))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn boto3's errors into OSErrors that name the object."""
        where = f"{self.root}/{name}"
        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status == 404:
                raise FileNotFoundError(2, "no such object or bucket", where) from None
            if status in (401, 403):
                raise PermissionError(13, f"the store refuses: {error}", where) from None
            raise UnavailableError(f"{where}: {error}") from None
        except (BotoCoreError, Boto3Error) as error:
            raise UnavailableError(f"{where}: {error}") from None


def _whole_body(response: urllib3.BaseHTTPResponse, offset: int, length: int | None, until: float) -> bytes:
    """Read the body of a response: `length` bytes from `offset` on, fewer if the object ends earlier."""
    start, expected = 0, None
    if response.status == 206:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match or int(match[1]) != offset:
            raise _TransientError(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')!r}")
        expected = int(match[2]) + 1 - offset
        total = None if match[3] == "*" else int(match[3])
        if length is not None and expected != (length if total is None else min(length, total - offset)):
            raise _TransientError(f"asked for {length} bytes from {offset}, got {match[0]!r}")
    else:  # a server without range support sends the whole object
        start = offset
        expected = int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
    chunks, received = [], 0
    while chunk := response.read1(CHUNK):
        end = None if length is None else max(start + length - received, 0)
        chunks.append(chunk[max(start - received, 0) : end])  # the rest of a whole object is not kept
        received += len(chunk)
        if expected is not None and received > expected:
            raise _TransientError(f"more than the {expected} bytes that were announced")
        if time.monotonic() > until:
            raise _TransientError(f"{received} bytes in {ATTEMPT:.0f} s: too slow")
    if expected is not None and received != expected:
        raise _TransientError(f"{received} bytes of a body of {expected}")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    """Seconds of a Retry-After header; 0 if there is none, or if it holds a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    pause = error.pause if isinstance(error, _TransientError) else 0.0
    backoff = wait_exponential_jitter(multiplier=PAUSE, max=LONGEST_PAUSE, jitter=PAUSE)
    return min(max(pause, backoff(state)), LONGEST_PAUSE)


def _log_retry(where: str, state: RetryCallState) -> None:
    tally("retries")
    error = state.outcome.exception() if state.outcome else None
    LOG.warning("%s: attempt %d failed: %s; retry in %.1f s", where, state.attempt_number, error, state.upcoming_sleep)


_CREATING = threading.Lock()
os.register_at_fork(before=_CREATING.acquire, after_in_parent=_CREATING.release, after_in_child=_CREATING.release)


# Connections do not survive a fork: each process has its own.
@functools.lru_cache(maxsize=1)
def _connections(pid: int) -> urllib3.PoolManager:
    return urllib3.PoolManager(num_pools=8, maxsize=POOL)


def _client(pid: int) -> Any:
    with _CREATING:  # many threads need the first client at the same time, and creating one is slow
        return _new_client(pid)


@functools.lru_cache(maxsize=1)
def _new_client(pid: int) -> Any:
    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT,
        read_timeout=ATTEMPT,
        max_pool_connections=POOL,
    )
    return boto3.session.Session().client("s3", config=config)


@functools.lru_cache(maxsize=4096)
def _presigned(pid: int, bucket: str, key: str, period: int) -> str:
    """A presigned URL for reading an object; signing is local. A new `period` gives a new URL."""
    url = _client(pid).generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=2 * PRESIGNED
    )
    return str(url)
