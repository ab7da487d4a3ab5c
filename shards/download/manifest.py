"""The manifest of a raw folder: `manifest.json` is written when the download is complete, and lists its content.

`raw/<folder>/.download/` holds the private state of an unfinished download.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import pydantic

from shards.atomic import write_atomic
from shards.catalog import Catalog, Download, Row
from shards.sources.paths import inside, is_system_file, own_file

MANIFEST = "manifest.json"
STATE = ".download"


class File(pydantic.BaseModel, extra="forbid", frozen=True):
    """A file of a repository or of a fixed URL. `sha256` is None if the publisher gives no hash."""

    path: str
    bytes: int
    sha256: str | None = None

    @pydantic.field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if own_file(PurePosixPath(inside(path))):
            raise ValueError(f"path {path!r} is that of a file of the downloader itself")
        return path


class Listing(pydantic.BaseModel, extra="forbid", frozen=True):
    """The selected files of a repository at one commit."""

    repo: str
    commit: str
    files: tuple[File, ...]


class MediaCounts(pydantic.BaseModel, extra="forbid", frozen=True):
    """Counts of images behind URLs: distinct URLs, images on disk, failed images, and `--max-images` if given."""

    urls: int
    present: int
    failed: int
    limit: int | None = None


class Manifest(pydantic.BaseModel, extra="forbid", frozen=True):
    """A complete download. Rows of several catalogs may share the folder: each run adds what its rows want.

    Attributes:
        download: the `download` that was fulfilled, joined over all runs.
        listing: files of the repository; None without a repository.
        archives: files from fixed URLs.
        extracted: archive -> number of files unpacked from it.
        media: counts of images behind URLs.
        warnings: what the catalog expects and the publisher's files do not have.
    """

    name: str
    download: Download
    listing: Listing | None = None
    archives: tuple[File, ...] = ()
    extracted: dict[str, int] = {}
    media: MediaCounts | None = None
    warnings: tuple[str, ...] = ()


def read_manifest(folder: Path, download: Download) -> Manifest | None:
    """The manifest of a raw folder; None if there is none, or if it does not cover `download`."""
    manifest = stored_manifest(folder)
    return manifest if manifest is not None and manifest.download.covers(download) else None


def stored_manifest(folder: Path) -> Manifest | None:
    """The manifest of a raw folder, whatever was asked for; None if there is none."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, pydantic.ValidationError):
        return None


def write_json(path: Path, value: pydantic.BaseModel | dict[str, object]) -> None:
    """Write a JSON file atomically; a reader sees the old file or the new one."""
    content = value.model_dump(mode="json") if isinstance(value, pydantic.BaseModel) else value
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def missing_folders(catalog: Catalog, row: Row, raw: Path) -> list[str]:
    """Raw folders that a row needs and that are incomplete.

    A folder with a download needs its manifest. A folder that a person or a tool of this project fills needs files: the
    files of the row's table, or any file in a folder of media.
    """
    downloads = catalog.downloads([row])
    missing = []
    for name in row.folders:
        download, folder = downloads.get(name), raw / name
        patterns = [row.pattern(stage) for stage in row.stages] if name == row.folder else ["*"]
        by_hand = download is None or download.kind in {"manual", "none"}
        fetched = download is None or not fetches(download) or read_manifest(folder, download) is not None
        if not fetched or (by_hand and not all(_any(folder, pattern) for pattern in patterns)):
            missing.append(name)
    return missing


def unfinished_folders(catalog: Catalog, row: Row, raw: Path) -> list[str]:
    """Raw folders of a row in which a download has started, and has not finished what the row wants."""
    downloads = catalog.downloads([row])
    started = [name for name in row.folders if (raw / name / STATE).exists()]
    return [name for name in started if name not in downloads or read_manifest(raw / name, downloads[name]) is None]


def fetches(download: Download) -> bool:
    """Whether a download has a part that is automatic."""
    return bool(download.repo or download.urls or download.extract)


def _any(folder: Path, pattern: str) -> bool:
    return any(path.name != STATE and not is_system_file(path) for path in folder.glob(pattern))
