"""An S3 bucket as a `shards.storage.base.Storage`, on any S3-compatible endpoint.

Credentials, region and endpoint are found as in every S3 client: `AWS_*` variables, `~/.aws`, instance roles. When the
bucket refuses a request, they are looked up again once, so files and tokens that are renewed during a run are used.
Ranges are read with pooled GETs on presigned URLs (`shards.storage.ranged`): the whole deadline is controlled, and a
read takes a fraction of the CPU time of boto3's `get_object`. All other requests use boto3.

Caching samples on disk is `shards.stream.cache`. Training never lists a bucket.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

from shards.storage.base import UnavailableError
from shards.storage.ranged import (
    ATTEMPT,
    CONNECT,
    DEADLINE,
    POOL,
    Location,
    TransientError,
    checked_parts,
    read_range,
)

ATTEMPTS = 8  # attempts of a request that is not a read
PRESIGNED = 900  # seconds that a presigned URL is used; it is valid twice as long
REMEDY = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, the region and the bucket's policy"
T = TypeVar("T")


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
        parts = checked_parts(self.root, name)
        return "/".join([self.prefix, *parts] if self.prefix else parts)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `storage.Storage.read` and `read_range`."""
        locate = functools.partial(_locate, self.bucket, self.key(name))
        return read_range(f"{self.root}/{name}", locate, offset, length, remedy=REMEDY, deadline=self.deadline)

    def write(self, name: str, data: bytes) -> None:
        """See `storage.Storage.write`; a put of an object is atomic."""
        self._ask(name, lambda client: client.put_object(Bucket=self.bucket, Key=self.key(name), Body=data))

    def create(self, name: str, data: bytes) -> bool:
        """See `storage.Storage.create`; a conditional put that fails if the object exists."""

        def put(client: Any) -> bool:
            try:
                client.put_object(Bucket=self.bucket, Key=self.key(name), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _status(error) in (409, 412):  # it exists or is being made
                    return False
                raise
            return True

        return self._ask(name, put)

    def publish(self, path: Path, name: str) -> None:
        """See `storage.Storage.publish`; large files are uploaded in parts, and the local file is removed afterwards.

        The client sends a checksum of every part, and the size of the object is compared at the end.
        """
        self._ask(name, lambda client: client.upload_file(str(path), self.bucket, self.key(name)))
        if (size := self.size(name)) != path.stat().st_size:
            raise UnavailableError(
                f"{self.root}/{name}: {size} bytes in the bucket after an upload of {path.stat().st_size}; run again"
            )
        path.unlink()

    def size(self, name: str) -> int | None:
        """See `storage.Storage.size`."""
        try:
            head = self._ask(name, lambda client: client.head_object(Bucket=self.bucket, Key=self.key(name)))
        except FileNotFoundError:
            return None
        return int(head["ContentLength"])

    def remove(self, name: str) -> None:
        """See `storage.Storage.remove`."""
        self._ask(name, lambda client: client.delete_object(Bucket=self.bucket, Key=self.key(name)))

    def list(self, suffix: str = "") -> list[str]:
        """See `storage.Storage.list`."""
        prefix = f"{self.prefix}/" if self.prefix else ""

        def keys(client: Any) -> list[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]

        visible = (name for name in self._ask("", keys) if not name.rsplit("/", 1)[-1].startswith("."))
        return sorted(name for name in visible if name.endswith(suffix))

    def _ask(self, name: str, call: Callable[[Any], T]) -> T:
        """Call with a client, once more with a new one if the bucket refuses; boto3's errors become OSErrors."""
        where = f"{self.root}/{name}"
        try:
            client = _client(os.getpid())
            try:
                return call(client)
            except (ClientError, Boto3Error) as error:
                if not _refuses(error):
                    raise
                return call(_renewed(client))
        except (BotoCoreError, ClientError, Boto3Error) as error:
            if _status(error) == 404:
                raise FileNotFoundError(2, "no such object or bucket", where) from None
            if _refuses(error):
                raise PermissionError(13, f"the store refuses: {error}; {REMEDY}", where) from None
            raise UnavailableError(f"{where}: {error}") from None


def _status(error: BaseException) -> int:
    """The HTTP status behind an error, 0 if there is none; an upload's error holds the client's as its context."""
    cause = error if isinstance(error, ClientError) else error.__context__
    if not isinstance(cause, ClientError):
        return 0
    return int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refuses(error: BaseException) -> bool:
    """Whether credentials are missing or not accepted; S3 answers expired ones with status 400."""
    missing = isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound)
    return missing or _status(error) in (400, 401, 403)


def _locate(bucket: str, key: str, refused: Location | None) -> Location:
    """Sign a URL for reading an object, by new credentials if `refused` was signed by those in use."""
    try:
        client = _client(os.getpid()) if refused is None else _renewed(refused.signer)
        return Location(_presigned(client, bucket, key, int(time.monotonic() / PRESIGNED)), signer=client)
    except (BotoCoreError, ClientError) as error:
        if _refuses(error):
            raise PermissionError(13, f"{error}; {REMEDY}", f"s3://{bucket}/{key}") from None
        raise TransientError(f"no credentials: {error}") from None  # the service that gives them does not answer


_CREATING = threading.Lock()
os.register_at_fork(before=_CREATING.acquire, after_in_parent=_CREATING.release, after_in_child=_CREATING.release)


def _client(pid: int) -> Any:
    with _CREATING:  # many threads need the first client at the same time, and creating one is slow
        return _new_client(pid)


def _renewed(refused: Any) -> Any:
    """The client of this process, made anew if it is the refused one: botocore reads files of credentials only once."""
    with _CREATING:
        if _new_client(os.getpid()) is refused:
            _new_client.cache_clear()
            _presigned.cache_clear()
        return _new_client(os.getpid())


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
def _presigned(client: Any, bucket: str, key: str, period: int) -> str:
    """A presigned URL for reading an object; signing is local. A new `period` gives a new URL."""
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=2 * PRESIGNED)
    return str(url)
