"""One raw folder from nothing to its manifest: repository files, archives, what is in them, images behind URLs.

Every step looks at what is there first, so that a killed download goes on where it ended. What a repository holds is
asked once and kept; workers that build shards never ask again.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydantic

from shards.catalog import Download
from shards.download.archives import ArchiveError, unpack
from shards.download.connect import FetchError, FetchLimits
from shards.download.fetch import ARCHIVE_LIMITS, IMAGE_LIMITS, fetch_file, remote_size
from shards.download.hub import DownloadError, fetch_files, list_files
from shards.download.manifest import (
    MANIFEST,
    STATE,
    File,
    Listing,
    Manifest,
    MediaCounts,
    asked,
    read_manifest,
    write_json,
)
from shards.download.urls import CROWD, Crowd, fetch_media, read_wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How folders are filled.

    Attributes:
        retry_failed: ask again for images that failed, and only for those.
        max_images: fetch only the images of the first so many URLs of a folder.
        images, archives: bounds of a URL.
        crowd: how many URLs at a time.
    """

    retry_failed: bool = False
    max_images: int | None = None
    images: FetchLimits = IMAGE_LIMITS
    archives: FetchLimits = ARCHIVE_LIMITS
    crowd: Crowd = CROWD


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Files of a download, their bytes, how many are of unknown size, and the bytes that are still to be fetched."""

    files: int = 0
    bytes: int = 0
    unknown: int = 0
    missing: int = 0

    def __add__(self, other: Forecast) -> Forecast:
        """Both together."""
        return Forecast(
            files=self.files + other.files,
            bytes=self.bytes + other.bytes,
            unknown=self.unknown + other.unknown,
            missing=self.missing + other.missing,
        )


def forecast(download: Download, folder: Path) -> Forecast:
    """Ask for the sizes of all files, fetching none.

    Raises:
        DownloadError: a repository that cannot be listed.
    """
    listed = _listing(download, folder)
    sizes = {file.path: file.bytes for file in listed.files} if listed else {}
    unknown = 0
    for path, url in download.urls.items():
        here = folder / path
        size = here.stat().st_size if here.is_file() else remote_size(url)
        if size is None:
            unknown += 1
        else:
            sizes[path] = size
    missing = sum(size for path, size in sizes.items() if not _has(folder / path, size))
    return Forecast(files=len(sizes) + unknown, bytes=sum(sizes.values()), unknown=unknown, missing=missing)


def fill(name: str, download: Download, folder: Path, wishes: Wishes) -> Manifest:
    """Fetch whatever is missing of a folder and write its manifest.

    Raises:
        DownloadError: something that cannot be had now; what was fetched stays.
    """
    known = read_manifest(folder, download)
    if known is not None and not wishes.retry_failed and _is_whole(known, folder, wishes.max_images):
        return known
    with _alone(name, folder):
        return _fill(name, download, folder, wishes)


@contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a killed one leaves no lock."""
    lock = folder / STATE / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{name}: another process downloads into {folder}; wait for it, or end it") from None
        yield


def _fill(name: str, download: Download, folder: Path, wishes: Wishes) -> Manifest:
    """`fill` without the look at an earlier manifest."""
    listing = _listing(download, folder)
    if listing is not None:
        _check_space(name, folder, listing)
        write_json(folder / STATE / "listing.json", _Asked(asked=asked(download), listing=listing))
        fetch_files(listing, folder)
    archives = tuple(_archive(path, url, download, folder, wishes.archives) for path, url in download.urls.items())
    extracted = _extract(download, folder)
    media = None
    if download.url_column and listing is not None:
        files = [folder / file.path for file in listing.files if file.path.endswith(".parquet")]
        wanted = read_wanted(files, download.url_column, download.sha256_column, wishes.max_images)
        here, failed = fetch_media(name, folder, wanted, wishes.images, wishes.crowd, wishes.retry_failed)
        if left := len(wanted) - here - failed:
            raise DownloadError(
                f"{name}: {left} of {len(wanted)} images were never asked for; run without --retry-failed"
            )
        media = MediaCounts(urls=len(wanted), present=here, failed=failed, limit=wishes.max_images)
    manifest = Manifest(
        name=name, download=download, listing=listing, archives=archives, extracted=extracted, media=media
    )
    write_json(folder / MANIFEST, manifest)
    return manifest


class _Asked(pydantic.BaseModel):
    """A listing with what was asked for, so that another revision or other globs list anew."""

    asked: dict[str, object]
    listing: Listing


def _listing(download: Download, folder: Path) -> Listing | None:
    if download.repo is None:
        return None
    try:
        kept = _Asked.model_validate_json((folder / STATE / "listing.json").read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        kept = None
    if kept is not None and kept.asked == asked(download):
        return kept.listing
    return list_files(download.repo, download.revision, download.include)


def _is_whole(manifest: Manifest, folder: Path, max_images: int | None) -> bool:
    """Whether the files are still there and the images are those that are asked for now."""
    files = [*(manifest.listing.files if manifest.listing else ()), *manifest.archives]
    limit = manifest.media.limit if manifest.media else None
    enough = limit is None or (max_images is not None and max_images <= limit)
    return enough and all(_has(folder / file.path, file.bytes) for file in files)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_space(name: str, folder: Path, listing: Listing) -> None:
    needed = sum(file.bytes for file in listing.files if not _has(folder / file.path, file.bytes))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{name}: {needed / 1e9:.1f} GB are still to be fetched and {free / 1e9:.1f} GB are free in {folder}; "
            "make room, or set MOLMO2_DATA to another disk"
        )


def _archive(path: str, url: str, download: Download, folder: Path, limits: FetchLimits) -> File:
    """A file from a fixed URL, fetched if it is not there, and checked where a hash is published."""
    here, marks = folder / path, folder / STATE / "files"
    mark = marks / f"{path.replace('/', '__')}.json"
    if here.is_file() and mark.is_file():
        kept = File.model_validate_json(mark.read_bytes())
        if kept.bytes == here.stat().st_size:
            return kept
    if not here.is_file():
        try:
            fetch_file(url, here, limits)
        except FetchError as error:
            remedy = f"the same command continues, or put the file at {here}"
            raise DownloadError(f"{url}: {error.reason}; {remedy}") from None
    with here.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    expected = download.sha256.get(path, found)
    if found != expected:
        here.unlink()
        raise DownloadError(f"{url}: sha256 {found}, the catalog says {expected}; the file was removed, run again")
    file = File(path=path, bytes=here.stat().st_size, sha256=found)
    write_json(mark, file)
    return file


def _extract(download: Download, folder: Path) -> dict[str, int]:
    """Unpack every archive that is not unpacked yet; archive -> number of its files."""
    done = {}
    for pattern, target in download.extract.items():
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not found:
            steps = f"; {download.instructions}" if download.instructions else ""
            raise DownloadError(f"{folder / pattern}: no such archive{steps}")
        for archive in found:
            path = archive.relative_to(folder).as_posix()
            mark = folder / STATE / "extracted" / f"{path.replace('/', '__')}.json"
            kept = _Unpacked.model_validate_json(mark.read_bytes()) if mark.is_file() else None
            if kept is not None and kept.bytes == archive.stat().st_size:
                done[path] = kept.files
                continue
            try:
                done[path] = unpack(archive, folder / target)
            except ArchiveError as error:
                raise DownloadError(str(error)) from None
            write_json(mark, _Unpacked(bytes=archive.stat().st_size, files=done[path]))
    return done


class _Unpacked(pydantic.BaseModel):
    """The mark of an archive that was unpacked to the last file."""

    bytes: int
    files: int
