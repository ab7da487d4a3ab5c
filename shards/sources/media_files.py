"""Resolving a media value of a row (path, URL, embedded bytes, id) to a local file or to bytes.

Only http, https, file and data URLs are allowed. A path or a file URL must stay below the dataset's folder, or below a
folder that `media_roots` of the catalog row names. The image of a URL is the file that `shards.download` stored; if no
download was run, it is fetched in the same way and checked against the row's hash. So is a video, with larger limits.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shards.atomic import replacing, write_atomic
from shards.download.connect import FetchError, FetchLimits
from shards.download.fetch import fetch_bytes, fetch_file
from shards.download.manifest import MANIFEST
from shards.download.urls import FAILURES, FetchFailure, media_path, read_failures
from shards.schema import ImageRef, MissingMediaError, RejectedError, VideoRef
from shards.sources.embedded import embedded_image
from shards.sources.paths import is_system_file, spellings

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
ONE_TRY = FetchLimits(attempts=1)
VIDEO_LIMITS = FetchLimits(max_bytes=4 << 30, max_seconds=3600.0, attempts=3)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFiles:
    """The media files of one dataset.

    Attributes:
        root: the raw folder of the dataset.
        templates: path templates of a file, tried in order; `{value}` is the media value, `{value_name}` its last part,
            and `{NAME}` the value of a column. They may hold one "*/" (any folder), and either end with ".*" (any of
            `VIDEO_SUFFIXES`) or hold one "*" in the file's name (any characters).
        others: folders that are searched after `root`.
        outside: folders that links, absolute paths and file URLs may lead to besides.
        limits: limits for fetching an image, if no download was run before.
        video_limits: limits for fetching a video.
        used: receives the path of every file that a row named, also of a missing one.
    """

    root: Path
    templates: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()
    outside: tuple[Path, ...] = ()
    limits: FetchLimits = ONE_TRY
    video_limits: FetchLimits = VIDEO_LIMITS
    used: set[Path] = field(default_factory=set)

    def image(self, value: Any, sha256: str | None = None, row: Mapping[str, Any] = {}) -> ImageRef:
        """The image of a path, a URL, bytes, or a struct with `bytes` or `path`; a list must hold one of these.

        Raises:
            RejectedError: the image is missing, outside of the folder, too large, or has another hash.
        """
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise RejectedError(f"media: a list of {len(value)} images where one is expected")
            value = value[0]
        if isinstance(value, Mapping):
            names = ("bytes", "path", "url")
            value = next((value[name] for name in names if value.get(name)), value)
        data = embedded_image(value, self.limits.max_bytes)
        if data is not None:
            return ImageRef(data=data)
        numbered = isinstance(value, int) and bool(self.templates)
        if not numbered and (not isinstance(value, str) or not value):
            raise RejectedError(f"media: no image in the row ({type(value).__name__})")
        path = self._of_url(value, self._fetch_image, sha256) if _is_url(value) else self._named(value, row)
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
            RejectedError: the file is missing, or outside of the folder, or cannot be fetched.
        """
        if str(value)[:5].lower() == "data:":
            raise RejectedError("media: a video as a data: URL is not read; write it into a file and name its path")
        if _is_url(value):
            path = self._of_url(value, self._fetch_video, None)
        else:
            path = self._named(value, row, folder=fps is not None)
        return VideoRef(path=str(path), start=start, end=end, fps=fps if path.is_dir() else None)

    def _named(self, value: Any, row: Mapping[str, Any], folder: bool = False) -> Path:
        if "\0" in str(value):
            raise RejectedError(f"media: {str(value)[:80]!r} cannot be opened: it holds a zero byte")
        try:
            candidate = next(self._candidates(value, row, folder), None)
            names = [template.format(**_fields(value, row)) for template in self.templates] or [str(value)]
        except RejectedError:
            raise
        except (KeyError, ValueError) as error:
            raise RejectedError(f"media: template {self.templates} does not fit {value!r}: {error!r}") from None
        except OSError as error:
            raise RejectedError(f"media: {str(value)[:80]!r} cannot be opened: {error.strerror}") from None
        if candidate is None:
            inside = self._below(self.root / names[0], self.root)
            self.used.add(inside)
            raise RejectedError(f"media: {inside} does not exist")
        path = self._below(*candidate)
        self.used.add(path)
        return path

    def _candidates(self, value: Any, row: Mapping[str, Any], folder: bool) -> Iterator[tuple[Path, Path]]:
        """Yield the existing files of the templates, each with the folder that it must stay below."""
        for template in self.templates or (None,):
            before, star, after = (template or "").rpartition("*/")
            suffixes = VIDEO_SUFFIXES if after.endswith(".*") else ("",)
            start, any_middle, end = after.removesuffix(".*").partition("*")
            fields = _fields(value, row)
            before, start, end = (part.format(**fields) for part in (before, start, end))
            if template is None:
                start = str(value)
            for root in (self.root, *self.others):
                folders = [root]
                if star:  # the row does not hold the name of the folder
                    self._below(root / before, root)  # a column may lead upwards
                    matches = (root / before).glob("*")
                    folders = sorted(p for p in matches if p.is_dir() and not is_system_file(p.relative_to(root)))
                places = [
                    (spelled, below)
                    for below in folders
                    for name in (_names_between(below, start, end) if any_middle else [start + s for s in suffixes])
                    for spelled in spellings(below, name)
                ]
                existing = [place for place in places if place[0].is_file() or (folder and place[0].is_dir())]
                if any_middle and len(existing) > 1:
                    raise RejectedError(f"media: {start}*{end} fits several files: {existing[0][0]}, {existing[1][0]}")
                if star and len({path.parent for path, _ in existing}) > 1:
                    raise RejectedError(f"media: {start} lies in several folders: {existing[0][0]}, {existing[1][0]}")
                yield from existing

    def _below(self, path: Path, root: Path) -> Path:
        resolved = Path(os.path.realpath(path))  # `resolve` raises a RuntimeError for a link to itself
        allowed = (root, self.root, *self.others, *self.outside)
        if not any(resolved.is_relative_to(folder.resolve()) for folder in allowed):
            where = "" if path == resolved else f" (it leads to {resolved})"
            raise RejectedError(
                f"media: {path} lies outside of {root}{where}; to allow it, name its folder in `media_roots` of the "
                f"catalog row, such as media_roots: [{resolved.parent}]"
            )
        return resolved

    def _of_url(self, url: str, fetch: Callable[[str, Path, str | None], None], sha256: str | None) -> Path:
        """The file of a URL; it is fetched if it is not on the disk and was not given up by a download."""
        try:
            parts = urlsplit(url)
        except ValueError:
            raise RejectedError(f"media: not a URL: {url}") from None
        if parts.scheme == "file":
            return self._of_file_url(unquote(parts.netloc + parts.path if parts.netloc != "localhost" else parts.path))
        if parts.scheme not in {"http", "https"}:
            raise RejectedError(f"media: {url}: scheme {parts.scheme!r} is not followed")
        stored = [root / media_path(url) for root in (self.root, *self.others)]
        path = next((place for place in stored if place.exists()), stored[0])
        self.used.add(path)
        if not path.exists():
            self._check_not_given_up(url)
            try:
                fetch(url, path, sha256)
            except FetchError as error:
                raise RejectedError(f"media: {error.reason}: {url}") from None
        return path

    def _of_file_url(self, name: str) -> Path:
        """The file of file:///NAME; file://images/1.png is not correct, but means a path below the folder."""
        try:
            path = self._below(next(spellings(self.root, name), self.root / name), self.root)
        except (OSError, ValueError) as error:
            if isinstance(error, RejectedError):
                raise
            why = error.strerror if isinstance(error, OSError) else error
            raise RejectedError(f"media: {name[:80]!r} cannot be opened: {why}") from None
        self.used.add(path)
        if not path.is_file():
            raise RejectedError(f"media: {path} does not exist")
        return path

    def _fetch_image(self, url: str, path: Path, sha256: str | None) -> None:
        data = fetch_bytes(url, self.limits)
        if sha256 is not None:
            _check_hash(url, data, sha256)  # before it is stored: a later try may get the right bytes
        write_atomic(path, data)

    def _fetch_video(self, url: str, path: Path, sha256: str | None) -> None:
        with replacing(path) as temporary:  # several workers may fetch the same video for its clips
            try:
                fetch_file(url, temporary, self.video_limits)
            finally:
                for rest in (".part", ".part.json"):
                    temporary.with_name(temporary.name + rest).unlink(missing_ok=True)
            with open(temporary, "rb") as file:
                if file.read(512).lstrip()[:1] in {b"", b"<", b"{"}:  # a page or an error in place of a video
                    raise FetchError("not a video")

    def _check_not_given_up(self, url: str) -> None:
        """Refuse to fetch after a finished download: a missing image has failed, which the download tool retries.

        Raises:
            MissingMediaError: the failure is on record, so that the row is left out and not a fault.
            RejectedError: the download says nothing about the URL.
        """
        for root in (self.root, *self.others):
            if (failure := _failures(root).get(url)) is not None:
                raise MissingMediaError(f"media: not downloaded, {failure.reason}: {url}")
            if limit := _image_limit(root):
                raise MissingMediaError(f"media: not downloaded, the download was limited to {limit} images: {url}")
        if any((root / MANIFEST).exists() for root in (self.root, *self.others)):
            raise RejectedError(f"media: not downloaded, {self.root / FAILURES} says why: {url}")


def _fields(value: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a template may name: the columns of the row, the media value, and the value's last part."""
    return {**row, "value": value, "value_name": str(value).replace("\\", "/").rpartition("/")[2]}


def _names_between(below: Path, start: str, end: str) -> list[str]:
    """Paths relative to `below` of the entries whose path begins with `start` and ends with `end`."""
    inner, slash, first = start.rpartition("/")
    folder = below / inner
    if not folder.is_dir():
        return []
    names = _sorted_names(folder, folder.stat().st_mtime_ns)
    begin = bisect.bisect_left(names, first)
    fitting = itertools.takewhile(lambda name: name.startswith(first), itertools.islice(names, begin, None))
    return [f"{inner}{slash}{name}" for name in fitting if name.endswith(end) and len(name) >= len(first) + len(end)]


@functools.lru_cache(maxsize=16)
def _sorted_names(folder: Path, mtime_ns: int) -> list[str]:
    """The sorted names in a folder, cached for one state of it: a collection has a folder of many thousand videos."""
    return sorted(name for name in os.listdir(folder) if not is_system_file(Path(name)))


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and _URL.match(value) is not None


def _image_limit(root: Path) -> int | None:
    """The `--max-images` of a finished download; None if there was none."""
    try:
        limit: int | None = json.loads((root / MANIFEST).read_bytes())["media"]["limit"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return limit


def _failures(root: Path) -> dict[str, FetchFailure]:
    try:
        status = (root / FAILURES).stat()
    except OSError:
        return {}
    return _read_failures(root, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_failures(root: Path, version: tuple[int, int]) -> dict[str, FetchFailure]:
    """The failures of a raw folder, cached for one version of the file."""
    return read_failures(root)


def _check_hash(where: str, data: bytes, sha256: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise RejectedError(f"media: another sha256 than the row says: {where} has {digest[:16]}, not {sha256[:16]}")
