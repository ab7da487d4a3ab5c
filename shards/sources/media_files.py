"""From a media value of a row (URL, embedded bytes, id) to a local file, within limits.

Only http, https and file URLs are followed. A file URL or a template must stay below the dataset's folder, and
downloads are bounded in size and time, checked against the row's hash, and kept under their URL's sha256.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.schema import ImageRef, RejectedError, VideoRef

MAX_BYTES = 64 << 20  # of one download
MAX_SECONDS = 60.0  # for one download


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFiles:
    """The media of one dataset.

    Attributes:
        root: its folder.
        template: path of a file, `{value}` being the row's value and `{NAME}` a column's; it may begin with "*/".
        others: folders in which a file is looked for after `root`.
    """

    root: Path
    template: str | None = None
    others: tuple[Path, ...] = ()

    def image(self, value: Any, sha256: str | None = None, row: Mapping[str, Any] = {}) -> ImageRef:
        """An image from a URL, from a struct of embedded `bytes`, or through the template.

        Raises:
            RejectedError: nothing there, a forbidden place, too large, or bytes of another hash.
        """
        if isinstance(value, dict) and value.get("bytes"):
            return ImageRef(data=value["bytes"])
        numbered = isinstance(value, int) and self.template is not None
        if not numbered and (not isinstance(value, str) or not value):
            raise RejectedError(f"media: no image in the row ({type(value).__name__})")
        path = self._fetch(value, sha256) if "://" in str(value) else self._named(value, row)
        if sha256 is not None:
            _check_hash(value, path.read_bytes(), sha256)
        return ImageRef(path=str(path))

    def video(
        self, value: Any, start: float | None = None, end: float | None = None, row: Mapping[str, Any] = {}
    ) -> VideoRef:
        """A video, or the part of it from `start` to `end` seconds.

        Raises:
            RejectedError: no such file, or a forbidden place.
        """
        return VideoRef(path=str(self._named(value, row)), start=start, end=end)

    def _named(self, value: Any, row: Mapping[str, Any]) -> Path:
        try:
            name = self.template.format(**{**row, "value": value}) if self.template else str(value)
        except (KeyError, ValueError) as error:
            raise RejectedError(f"media: template {self.template!r} does not fit {value!r}: {error!r}") from None
        roots = (self.root, *self.others)
        if name.startswith("*/"):  # one folder whose name nobody knows beforehand
            roots, name = tuple(sorted(path for path in self.root.iterdir() if path.is_dir())), name[2:]
        found = next((root for root in roots if (root / name).is_file()), self.root)
        return self._below(found / name, found)

    def _below(self, path: Path, root: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise RejectedError(f"media: {path} lies outside of {root}")
        if not resolved.is_file():
            raise RejectedError(f"media: {path} does not exist")
        return resolved

    def _fetch(self, url: str, sha256: str | None) -> Path:
        parts = urlsplit(url)
        if parts.scheme == "file":
            return self._below(Path(unquote(parts.path)), self.root)
        if parts.scheme not in {"http", "https"}:
            raise RejectedError(f"media: {url}: scheme {parts.scheme!r} is not followed")
        name = Path("media") / hashlib.sha256(url.encode()).hexdigest()
        kept = next((root / name for root in (self.root, *self.others) if (root / name).exists()), self.root / name)
        if not kept.exists():
            data = _download(url)
            if sha256 is not None:
                _check_hash(url, data, sha256)  # before it is kept: a later try may get the right bytes
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(kept)
        return kept


def _check_hash(where: str, data: bytes, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise RejectedError(f"media: another sha256 than the row says: {where} has {found[:16]}, not {sha256[:16]}")


def _download(url: str) -> bytes:
    data, end = bytearray(), time.monotonic() + MAX_SECONDS
    try:
        with urllib.request.urlopen(url, timeout=MAX_SECONDS) as response:
            while chunk := response.read1(1 << 20):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise RejectedError(f"media: larger than {MAX_BYTES} bytes: {url}")
                if time.monotonic() > end:
                    raise RejectedError(f"media: not fetched within {MAX_SECONDS:.0f} s: {url}")
            if response.length:  # what the server promised and did not send
                raise RejectedError(f"media: the connection broke after {len(data)} bytes: {url}")
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise RejectedError(f"media: {error}: {url}") from None
    return bytes(data)
