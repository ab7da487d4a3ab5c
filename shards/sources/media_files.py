"""Resolving a media value of a row (URL, embedded bytes, id) to a local file.

Only http, https and file URLs are allowed. A file URL or a template must stay below the dataset's folder. The image of
a URL is the file that `shards.download` stored; if no download was run, it is fetched in the same way and checked
against the row's hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.atomic import write_atomic
from shards.download.connect import FetchError, FetchLimits
from shards.download.fetch import fetch_bytes
from shards.download.manifest import MANIFEST
from shards.download.urls import FAILURES, media_path
from shards.schema import ImageRef, RejectedError, VideoRef

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
ONE_TRY = FetchLimits(attempts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFiles:
    """The media files of one dataset.

    Attributes:
        root: the raw folder of the dataset.
        templates: path templates of a file, tried in order; `{value}` is the media value and `{NAME}` a column's. They
            may hold one "*/" (any folder) and may end with ".*" (any of `VIDEO_SUFFIXES`).
        others: folders that are searched after `root`.
        limits: limits for fetching an image, if no download was run before.
    """

    root: Path
    templates: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    limits: FetchLimits = ONE_TRY

    def image(self, value: Any, sha256: str | None = None, row: Mapping[str, Any] = {}) -> ImageRef:
        """The image of a URL, of a struct with embedded `bytes`, or of a path template.

        Raises:
            RejectedError: the image is missing, outside of the folder, too large, or has another hash.
        """
        if isinstance(value, dict) and value.get("bytes"):
            return ImageRef(data=value["bytes"])
        numbered = isinstance(value, int) and bool(self.templates)
        if not numbered and (not isinstance(value, str) or not value):
            raise RejectedError(f"media: no image in the row ({type(value).__name__})")
        path = self._fetch(value, sha256) if "://" in str(value) else self._named(value, row)
        if sha256 is not None:
            _check_hash(value, path.read_bytes(), sha256)
        return ImageRef(path=str(path))

    def video(
        self,
        value: Any,
        start: float | None = None,
        end: float | None = None,
        row: Mapping[str, Any] = {},
        fps: float | None = None,
    ) -> VideoRef:
        """A video, or the part of it from `start` to `end` seconds; with `fps` it may be a folder of frames.

        Raises:
            RejectedError: the file is missing, or outside of the folder.
        """
        path = self._named(value, row, folder=fps is not None)
        return VideoRef(path=str(path), start=start, end=end, fps=fps if path.is_dir() else None)

    def _named(self, value: Any, row: Mapping[str, Any], folder: bool = False) -> Path:
        try:
            candidate = next(self._candidates(value, row, folder), None)
        except (KeyError, ValueError) as error:
            raise RejectedError(f"media: template {self.templates} does not fit {value!r}: {error!r}") from None
        if candidate is None:
            names = [template.format(**{**row, "value": value}) for template in self.templates] or [str(value)]
            inside = self._below(self.root / names[0], self.root)
            raise RejectedError(f"media: {inside} does not exist")
        return self._below(*candidate)

    def _candidates(self, value: Any, row: Mapping[str, Any], folder: bool) -> Iterator[tuple[Path, Path]]:
        """Yield the existing files of the templates, each with the folder that it must stay below."""
        for template in self.templates or (None,):
            before, star, after = (template or "").rpartition("*/")
            fields = {**row, "value": value}
            before, name = before.format(**fields), after.format(**fields) if template else str(value)
            names = [name[:-2] + suffix for suffix in VIDEO_SUFFIXES] if name.endswith(".*") else [name]
            for root in (self.root, *self.others):
                folders = [root]
                if star:  # the row does not hold the name of the folder
                    folders = sorted(path for path in (root / before).glob("*") if path.is_dir())
                places = [(below / n, below) for below in folders for n in names]
                existing = [place for place in places if place[0].is_file() or (folder and place[0].is_dir())]
                if star and len({path.parent for path, _ in existing}) > 1:
                    raise RejectedError(f"media: {name} lies in several folders: {existing[0][0]}, {existing[1][0]}")
                yield from existing

    def _below(self, path: Path, root: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise RejectedError(f"media: {path} lies outside of {root}")
        return resolved

    def _fetch(self, url: str, sha256: str | None) -> Path:
        parts = urlsplit(url)
        if parts.scheme == "file":
            path = self._below(Path(unquote(parts.path)), self.root)
            if not path.is_file():
                raise RejectedError(f"media: {path} does not exist")
            return path
        if parts.scheme not in {"http", "https"}:
            raise RejectedError(f"media: {url}: scheme {parts.scheme!r} is not followed")
        name = media_path(url)
        path = next((root / name for root in (self.root, *self.others) if (root / name).exists()), self.root / name)
        if not path.exists():
            self._check_not_given_up(url)
            try:
                data = fetch_bytes(url, self.limits)
            except FetchError as error:
                raise RejectedError(f"media: {error.reason}: {url}") from None
            if sha256 is not None:
                _check_hash(url, data, sha256)  # before it is stored: a later try may get the right bytes
            write_atomic(path, data)
        return path

    def _check_not_given_up(self, url: str) -> None:
        """Refuse to fetch after a finished download: a missing image has failed, which the download tool retries."""
        if any((root / MANIFEST).exists() for root in (self.root, *self.others)):
            raise RejectedError(f"media: not downloaded, {self.root / FAILURES} says why: {url}")


def _check_hash(where: str, data: bytes, sha256: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise RejectedError(f"media: another sha256 than the row says: {where} has {digest[:16]}, not {sha256[:16]}")
