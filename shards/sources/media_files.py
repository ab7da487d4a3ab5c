"""From a media value of a row (URL, embedded bytes, id) to a local file, within limits.

Only http, https and file URLs are followed. A file URL or a template must stay below the dataset's folder. An image
behind a URL is the one that `shards.download` has kept; where no download was run it is fetched in the same way, and
checked against the row's hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.download.connect import FetchError, FetchLimits
from shards.download.fetch import fetch_bytes
from shards.download.manifest import MANIFEST
from shards.download.urls import FAILURES, keep, kept_as
from shards.schema import ImageRef, RejectedError, VideoRef

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
ONE_TRY = FetchLimits(attempts=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFiles:
    """The media of one dataset.

    Attributes:
        root: its folder.
        templates: paths of a file, tried in order, `{value}` being the row's value and `{NAME}` a column's; they may
            hold one "*/", any folder, and end with ".*", any of `VIDEO_SUFFIXES`.
        others: folders in which a file is looked for after `root`.
        limits: bounds of an image that is fetched now, because no download was run before.
    """

    root: Path
    templates: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    limits: FetchLimits = ONE_TRY

    def image(self, value: Any, sha256: str | None = None, row: Mapping[str, Any] = {}) -> ImageRef:
        """An image from a URL, from a struct of embedded `bytes`, or through the template.

        Raises:
            RejectedError: nothing there, a forbidden place, too large, or bytes of another hash.
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
            RejectedError: no such file, or a forbidden place.
        """
        path = self._named(value, row, folder=fps is not None)
        return VideoRef(path=str(path), start=start, end=end, fps=fps if path.is_dir() else None)

    def _named(self, value: Any, row: Mapping[str, Any], folder: bool = False) -> Path:
        try:
            found = next(self._candidates(value, row, folder), None)
        except (KeyError, ValueError) as error:
            raise RejectedError(f"media: template {self.templates} does not fit {value!r}: {error!r}") from None
        if found is None:
            names = [template.format(**{**row, "value": value}) for template in self.templates] or [str(value)]
            inside = self._below(self.root / names[0], self.root)
            raise RejectedError(f"media: {inside} does not exist")
        return self._below(*found)

    def _candidates(self, value: Any, row: Mapping[str, Any], folder: bool) -> Iterator[tuple[Path, Path]]:
        """What is there under the templates' names, and below which root."""
        for template in self.templates or (None,):
            before, star, after = (template or "").rpartition("*/")
            fields = {**row, "value": value}
            before, name = before.format(**fields), after.format(**fields) if template else str(value)
            names = [name[:-2] + suffix for suffix in VIDEO_SUFFIXES] if name.endswith(".*") else [name]
            for root in (self.root, *self.others):
                folders = [root]
                if star:  # a folder whose name the row does not say
                    folders = sorted(path for path in (root / before).glob("*") if path.is_dir())
                places = [(below / n, below) for below in folders for n in names]
                found = [place for place in places if place[0].is_file() or (folder and place[0].is_dir())]
                if star and len({path.parent for path, _ in found}) > 1:
                    raise RejectedError(f"media: {name} lies in several folders: {found[0][0]}, {found[1][0]}")
                yield from found

    def _below(self, path: Path, root: Path) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise RejectedError(f"media: {path} lies outside of {root}")
        return resolved

    def _fetch(self, url: str, sha256: str | None) -> Path:
        parts = urlsplit(url)
        if parts.scheme == "file":
            found = self._below(Path(unquote(parts.path)), self.root)
            if not found.is_file():
                raise RejectedError(f"media: {found} does not exist")
            return found
        if parts.scheme not in {"http", "https"}:
            raise RejectedError(f"media: {url}: scheme {parts.scheme!r} is not followed")
        name = kept_as(url)
        kept = next((root / name for root in (self.root, *self.others) if (root / name).exists()), self.root / name)
        if not kept.exists():
            self._check_not_given_up(url)
            try:
                data = fetch_bytes(url, self.limits)
            except FetchError as error:
                raise RejectedError(f"media: {error.reason}: {url}") from None
            if sha256 is not None:
                _check_hash(url, data, sha256)  # before it is kept: a later try may get the right bytes
            keep(kept, data)
        return kept

    def _check_not_given_up(self, url: str) -> None:
        """After a finished download an image that is not there has failed already; asking again is for its tool."""
        if any((root / MANIFEST).exists() for root in (self.root, *self.others)):
            raise RejectedError(f"media: not downloaded, {self.root / FAILURES} says why: {url}")


def _check_hash(where: str, data: bytes, sha256: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise RejectedError(f"media: another sha256 than the row says: {where} has {found[:16]}, not {sha256[:16]}")
