"""Published shards as a read-only `shards.storage.base.Storage`: folders of web servers and of the Hugging Face hub.

    https://host/folder                             any server that answers requests for byte ranges
    hf://datasets/OWNER/NAME[@REVISION]/folder      a dataset repository; hf://OWNER/NAME a model repository

Redirects are followed once and remembered, so a read is one request to the host that has the bytes. A branch of the
hub is read at the commit that it had at the first read: an upload during a run is no damage of its shards.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from shards.storage.base import UnavailableError
from shards.storage.ranged import (
    ATTEMPT,
    CHUNK,
    DEADLINE,
    Location,
    Response,
    check_status,
    checked_parts,
    read_range,
    request,
    retried,
)

REMEMBERED = 3000  # seconds that the target of a redirect is used; the hub signs its targets for an hour
REDIRECTS = 5
_REPO = r"(?P<repo>(?!(?:datasets|spaces|buckets)/)[^/@]+/[^/@]+)"
_HUB = re.compile(rf"hf://(?P<kind>datasets/)?{_REPO}(@(?P<revision>[^/]+))?(/(?P<folder>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class _Found:
    """A file after all redirects; `ranges`: whether the server sends parts of files."""

    location: Location
    size: int
    ranges: bool


class WebStorage:
    """A folder of a web server. It holds no connection, so it can be pickled to workers."""

    remedy = "check the URL, and that everybody may read what it names"

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self.deadline = DEADLINE
        parts = urlsplit(url)
        if not parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"{url}: write the URL of a folder, https://host/folder, without ? and #")

    def url(self, name: str) -> str:
        """Where a file is asked for.

        Raises:
            ValueError: the name is absolute or leaves the root.
        """
        return f"{self.root}/{quote('/'.join(checked_parts(self.root, name)))}"

    def authorization(self) -> str:
        """The header of that name; empty if there is none."""
        return ""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `storage.Storage.read` and `read_range`."""
        where, url, authorization = f"{self.root}/{name}", self.url(name), self.authorization()
        is_part = offset > 0 or length is not None

        def locate(refused: Location | None) -> Location:
            period = int(time.monotonic() / REMEMBERED)
            found = _followed(os.getpid(), where, url, authorization, self.remedy, period)
            if refused is not None and found.location is refused:  # the signature of the target has expired
                _followed.cache_clear()
                found = _followed(os.getpid(), where, url, authorization, self.remedy, period)
            if is_part and not found.ranges:
                remedy = "read from a server that answers requests for byte ranges, or copy the shards"
                raise PermissionError(13, f"the server sends only whole files; {remedy}", where)
            return found.location

        return read_range(where, locate, offset, length, remedy=self.remedy, deadline=self.deadline)

    def size(self, name: str) -> int | None:
        """See `storage.Storage.size`."""
        where, url = f"{self.root}/{name}", self.url(name)
        try:
            return retried(where, lambda: _follow(where, url, self.authorization(), self.remedy).size, self.deadline)
        except FileNotFoundError:
            return None

    def list(self, suffix: str = "") -> list[str]:
        """See `storage.Storage.list`.

        Raises:
            io.UnsupportedOperation: always, since web servers do not list files.
        """
        raise io.UnsupportedOperation(f"{self.root}: a web server does not list its files; name one dataset's folder")

    def write(self, name: str, data: bytes) -> None:
        """Refused, like all that changes files.

        Raises:
            io.UnsupportedOperation: always.
        """
        raise self._read_only(name)

    def create(self, name: str, data: bytes) -> bool:
        """See `write`."""
        raise self._read_only(name)

    def publish(self, path: Path, name: str) -> None:
        """See `write`."""
        raise self._read_only(name)

    def remove(self, name: str) -> None:
        """See `write`."""
        raise self._read_only(name)

    def _read_only(self, name: str) -> io.UnsupportedOperation:
        return io.UnsupportedOperation(
            f"{self.root}/{name}: it cannot be written, since https:// and hf:// are only read; "
            "write to a folder or to s3://bucket/prefix, and publish that"
        )


class HubStorage(WebStorage):
    """A folder of a repository on the Hugging Face hub."""

    remedy = (
        "check the name, hf://datasets/OWNER/NAME@REVISION/folder; for a gated or private repository ask for access on "
        "its page and log in (hf auth login, or HF_TOKEN)"
    )

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self.deadline = DEADLINE
        match = _HUB.fullmatch(self.root)
        if not match:
            raise ValueError(f"{url}: write hf://datasets/OWNER/NAME/folder, or OWNER/NAME@REVISION")
        self.kind, self.repo, self.folder = match["kind"] or "", match["repo"], match["folder"] or ""
        self.revision = unquote(match["revision"] or "main")

    def url(self, name: str) -> str:
        """See `WebStorage.url`."""
        path = "/".join([*([self.folder] if self.folder else []), *checked_parts(self.root, name)])
        return f"{_endpoint(self.root)}/{self.kind}{self.repo}/resolve/{self.commit()}/{quote(path)}"

    def authorization(self) -> str:
        """The user's token."""
        from huggingface_hub import get_token

        token = get_token()
        return f"Bearer {token}" if token else ""

    def commit(self) -> str:
        """The commit that is read; it is found once and then goes with the storage to workers."""
        if not _COMMIT.fullmatch(self.revision):
            url = f"{self._api()}/revision/{quote(self.revision, safe='')}"
            self.revision = _commit_of(self.root, url, self.authorization(), self.deadline)
        return self.revision

    def list(self, suffix: str = "") -> list[str]:
        """See `storage.Storage.list`."""
        below = f"/{quote(self.folder)}" if self.folder else ""
        page = f"{self._api()}/tree/{self.commit()}{below}?recursive=true"
        prefix, names = f"{self.folder}/" if self.folder else "", list[str]()
        while page:
            try:
                entries, page = _ask_hub(self.root, page, self.authorization(), self.deadline)
            except FileNotFoundError:  # no such folder
                return []
            names += [entry["path"].removeprefix(prefix) for entry in entries if entry["type"] == "file"]
        return sorted(name for name in names if name.endswith(suffix) and not name.rsplit("/", 1)[-1].startswith("."))

    def _api(self) -> str:
        return f"{_endpoint(self.root)}/api/{self.kind or 'models/'}{self.repo}"


def open_web(url: str) -> WebStorage:
    """Open a read-only storage.

    Raises:
        ValueError: the URL names no folder.
    """
    return HubStorage(url) if url.startswith("hf://") else WebStorage(url)


def _endpoint(root: str) -> str:
    """The address of the hub, `HF_ENDPOINT`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UnavailableError(f"{root}: HF_HUB_OFFLINE is set, so nothing is read from the hub; unset it")
    return str(constants.ENDPOINT)


@functools.lru_cache(maxsize=1024)
def _commit_of(root: str, url: str, authorization: str, deadline: float) -> str:
    """All datasets of a process are read at one commit of a branch."""
    try:
        return str(_ask_hub(root, url, authorization, deadline)[0]["sha"])
    except FileNotFoundError as error:
        raise PermissionError(13, f"no such repository or revision; {HubStorage.remedy}", root) from error


def _ask_hub(root: str, url: str, authorization: str, deadline: float) -> tuple[Any, str]:
    """The JSON answer of the hub, and the URL of its next page or ""."""

    def attempt() -> tuple[Any, str]:
        location = Location(url, {"Authorization": authorization} if authorization else {})
        with request(location, 0, None, time.monotonic() + ATTEMPT, REDIRECTS) as response:
            check_status(response, root, HubStorage.remedy)
            following = re.search(r'<([^<>]*)>; *rel="next"', response.headers.get("Link", ""))
            return json.loads(response.read()), following[1] if following else ""

    return retried(root, attempt, deadline)


@functools.lru_cache(maxsize=4096)
def _followed(pid: int, where: str, url: str, authorization: str, remedy: str, period: int) -> _Found:
    """The file behind a URL; a new `period` follows its redirects anew."""
    return _follow(where, url, authorization, remedy)


def _follow(where: str, url: str, authorization: str, remedy: str) -> _Found:
    """Ask for the first byte of a file, and follow all redirects."""
    headers = {"Authorization": authorization} if authorization else {}
    with request(Location(url, headers), 0, 0, time.monotonic() + ATTEMPT, REDIRECTS) as response:
        check_status(response, where, remedy)
        if response.status != 200:
            response.read(CHUNK)  # a byte, or the text of an error; the connection is free then
        target = url
        for step in response.retries.history if response.retries else ():
            target = urljoin(target, step.redirect_location or "")
        kept = headers if urlsplit(target)[:2] == urlsplit(url)[:2] else {}  # the token is for the hub alone
        return _Found(Location(target, kept), _total(response), response.status != 200)


def _total(response: Response) -> int:
    """Size of the whole file."""
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status == 200:
        size = response.headers.get("Content-Length", "0")
    return int(size) if size.isdecimal() else 0
