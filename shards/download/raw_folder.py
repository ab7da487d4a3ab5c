"""Filling one raw folder: repository files, archives and their contents, images behind URLs, and the manifest.

Every step first checks what is on disk, so a killed download resumes. The file list of a repository is requested once
and stored; a build of shards never requests it. A folder that rows of several stages read is filled with all that the
runs so far were asked for, at the commit of the first one.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import pydantic

from shards.atomic import LockHeldError, file_lock
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
    read_manifest,
    stored_manifest,
    write_json,
)
from shards.download.urls import DEFAULT_POLICY, FetchPolicy, fetch_media, read_wanted
from shards.sources.paths import is_system_file


@dataclass(frozen=True, slots=True, kw_only=True)
class FillOptions:
    """Options of `fill`.

    Attributes:
        retry_failed: retry the images that failed before, and fetch no others.
        update: move to the repository's newest commit; otherwise a folder keeps the commit of its first download.
        max_images: fetch only the images of the first `max_images` distinct URLs of a folder; None fetches all.
        images: limits of the download of an image.
        archives: limits of the download of an archive.
        policy: concurrency and failure budget of the image downloads.
    """

    retry_failed: bool = False
    update: bool = False
    max_images: int | None = None
    images: FetchLimits = IMAGE_LIMITS
    archives: FetchLimits = ARCHIVE_LIMITS
    policy: FetchPolicy = DEFAULT_POLICY


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Size of a download: number of files, their bytes, files of unknown size, and bytes that are still missing."""

    files: int = 0
    bytes: int = 0
    unknown: int = 0
    missing: int = 0

    def __add__(self, other: Forecast) -> Forecast:
        """The sum of two forecasts."""
        return Forecast(
            files=self.files + other.files,
            bytes=self.bytes + other.bytes,
            unknown=self.unknown + other.unknown,
            missing=self.missing + other.missing,
        )


def forecast(download: Download, folder: Path) -> Forecast:
    """Request the sizes of all files without fetching them.

    Raises:
        DownloadError: the repository cannot be listed.
    """
    download = _target(download, folder)
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


def fill(name: str, download: Download, folder: Path, options: FillOptions) -> Manifest:
    """Fetch the missing files of a folder and write its manifest. What an earlier download fetched stays part of it.

    Raises:
        DownloadError: something cannot be fetched now; files that were fetched stay.
    """
    known = read_manifest(folder, download)
    if (
        known is not None
        and not options.update
        and not options.retry_failed
        and _is_whole(known, folder, options.max_images)
    ):
        return known
    try:
        with file_lock(folder / STATE / "lock"):
            return _fill(name, _target(download, folder), folder, options)
    except LockHeldError:
        raise DownloadError(f"{name}: another process downloads into {folder}; wait for it, or end it") from None


def _fill(name: str, download: Download, folder: Path, options: FillOptions) -> Manifest:
    """`fill` without the check of an earlier manifest."""
    if options.update:
        _forget_commit(download, folder)
    listing = _listing(download, folder)
    if listing is not None:
        _check_space(name, folder, listing)
        write_json(folder / STATE / "listing.json", _CachedListing(asked=download.files(), listing=listing))
        fetch_files(listing, folder)
    archives = tuple(_archive(path, url, download, folder, options.archives) for path, url in download.urls.items())
    extracted, warnings = _extract(download, folder)
    media = None
    if download.url_column and listing is not None:
        files = [folder / file.path for file in listing.files if file.path.endswith(".parquet")]
        wanted = read_wanted(files, download.url_column, download.sha256_column, options.max_images)
        num_present, failed = fetch_media(name, folder, wanted, options.images, options.policy, options.retry_failed)
        if left := len(wanted) - num_present - failed:
            raise DownloadError(
                f"{name}: {left} of {len(wanted)} images were never asked for; run without --retry-failed"
            )
        media = MediaCounts(urls=len(wanted), present=num_present, failed=failed, limit=options.max_images)
    manifest = Manifest(
        name=name,
        download=download,
        listing=listing,
        archives=archives,
        extracted=extracted,
        media=media,
        warnings=warnings,
    )
    write_json(folder / MANIFEST, manifest)
    return manifest


class _CachedListing(pydantic.BaseModel):
    """A stored listing with the request that it answers."""

    asked: dict[str, object]
    listing: Listing


def _target(download: Download, folder: Path) -> Download:
    """What the folder is to hold: `download`, and what it already holds for rows that want other files of it."""
    known = stored_manifest(folder)
    try:
        return known.download.joined(download) if known else download
    except ValueError:  # the catalog has moved to another repository, revision or URL
        return download


def _listing(download: Download, folder: Path) -> Listing | None:
    """The files of the repository; other globs than before are listed at the commit of the first download."""
    if download.repo is None:
        return None
    cached = _stored_listing(download, folder)
    if cached is None:
        return list_files(download.repo, download.revision, download.include)
    if tuple(cached.asked["include"]) == download.include:  # type: ignore[arg-type]
        return cached.listing
    return list_files(download.repo, cached.listing.commit, download.include)


def _stored_listing(download: Download, folder: Path) -> _CachedListing | None:
    """The listing of an earlier download; None if there is none, or if it is of another repository or revision."""
    try:
        cached = _CachedListing.model_validate_json((folder / STATE / "listing.json").read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None
    same = all(cached.asked.get(name) == getattr(download, name) for name in ("repo", "revision"))
    return cached if same else None


def _forget_commit(download: Download, folder: Path) -> None:
    """Make the folder incomplete at an old commit: what changed is fetched again, and what is gone is removed."""
    old = _stored_listing(download, folder)
    if old is None or download.repo is None:
        return
    new = list_files(download.repo, download.revision, download.include)
    if new.commit == old.listing.commit:
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for file in {file.path for file in old.listing.files} - {file.path for file in new.files}:
        (folder / file).unlink(missing_ok=True)
    write_json(folder / STATE / "listing.json", _CachedListing(asked=download.files(), listing=new))


def _is_whole(manifest: Manifest, folder: Path, max_images: int | None) -> bool:
    """Whether all files of a manifest are on disk and unpacked, and as many images as `max_images` requests now."""
    packed = (path for pattern in manifest.download.extract for path in _archives(folder, pattern))
    if any(path.relative_to(folder).as_posix() not in manifest.extracted for path in packed):
        return False
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
    """Fetch a file from a fixed URL if it is missing, and check its hash if one is published."""
    here, marks = folder / path, folder / STATE / "files"
    mark = marks / f"{path.replace('/', '__')}.json"
    if here.is_file() and mark.is_file():
        recorded = File.model_validate_json(mark.read_bytes())
        if recorded.bytes == here.stat().st_size:
            return recorded
    if not here.is_file():
        try:
            fetch_file(url, here, limits)
        except FetchError as error:
            remedy = f"the same command continues, or put the file at {here}"
            raise DownloadError(f"{url}: {error.reason}; {remedy}") from None
    with here.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    expected = download.sha256.get(path, sha256)
    if sha256 != expected:
        here.unlink()
        raise DownloadError(f"{url}: sha256 {sha256}, the catalog says {expected}; the file was removed, run again")
    file = File(path=path, bytes=here.stat().st_size, sha256=sha256)
    write_json(mark, file)
    return file


def _archives(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not is_system_file(path))


def _extract(download: Download, folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Unpack every archive that is not unpacked yet.

    Returns:
        archive -> number of its files, and a warning for each pattern without a match: the publisher may not have what
        the catalog expects, which must not keep the other archives packed.
    """
    num_files, warnings = dict[str, int](), list[str]()
    for pattern, target in download.extract.items():
        matches = _archives(folder, pattern)
        if not matches:
            steps = f"; {download.instructions}" if download.instructions else ""
            warnings.append(f"{folder / pattern}: no such archive, nothing was unpacked{steps}")
        for archive in matches:
            path = archive.relative_to(folder).as_posix()
            mark = folder / STATE / "extracted" / f"{path.replace('/', '__')}.json"
            recorded = _Unpacked.model_validate_json(mark.read_bytes()) if mark.is_file() else None
            if recorded is not None and recorded.bytes == archive.stat().st_size:
                num_files[path] = recorded.files
                continue
            try:
                num_files[path] = unpack(archive, folder / target, raw=folder)
            except ArchiveError as error:
                raise DownloadError(str(error)) from None
            write_json(mark, _Unpacked(bytes=archive.stat().st_size, files=num_files[path]))
    return num_files, tuple(warnings)


class _Unpacked(pydantic.BaseModel):
    """The record of an archive that was unpacked completely: its bytes, and the number of its files."""

    bytes: int
    files: int
