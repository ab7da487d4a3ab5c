"""What lies in a raw folder: `manifest.json`, written when its download is complete, and read instead of asking again.

`raw/<folder>/.download/` holds the state of an unfinished download; nothing else needs to know what is in there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pydantic

from shards.catalog import Catalog, Download, Row, split_of

MANIFEST = "manifest.json"
STATE = ".download"


class File(pydantic.BaseModel, extra="forbid", frozen=True):
    """A file of a repository or behind a fixed URL. `sha256` is None where the publisher names no such hash."""

    path: str
    bytes: int
    sha256: str | None = None


class Listing(pydantic.BaseModel, extra="forbid", frozen=True):
    """The wanted files of a repository at one commit."""

    repo: str
    commit: str
    files: tuple[File, ...]


class MediaCounts(pydantic.BaseModel, extra="forbid", frozen=True):
    """Images behind URLs: different URLs in the rows, those here, those that failed, and the `--max-images` if any."""

    urls: int
    present: int
    failed: int
    limit: int | None = None


class Manifest(pydantic.BaseModel, extra="forbid", frozen=True):
    """A complete download.

    Attributes:
        download: what the catalog asked for.
        listing: the repository's files, if there is one.
        archives: files from fixed URLs.
        extracted: archive -> number of files that were unpacked from it.
        media: counts of images behind URLs.
    """

    name: str
    download: Download
    listing: Listing | None = None
    archives: tuple[File, ...] = ()
    extracted: dict[str, int] = {}
    media: MediaCounts | None = None


def read_manifest(folder: Path, download: Download) -> Manifest | None:
    """The manifest of a raw folder, None where there is none or the catalog asks for something else by now."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, pydantic.ValidationError):
        return None
    return manifest if asked(manifest.download) == asked(download) else None


def asked(download: Download) -> dict[str, object]:
    """What makes two downloads the same: all but the words to a person."""
    return download.model_dump(mode="json", exclude={"instructions"})


def write_json(path: Path, value: pydantic.BaseModel | dict[str, object]) -> None:
    """Write atomically; a reader sees the old file or the new one."""
    content = value.model_dump(mode="json") if isinstance(value, pydantic.BaseModel) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def missing_folders(catalog: Catalog, row: Row, raw: Path) -> list[str]:
    """Raw folders that a row needs and that are not filled.

    A folder with something to fetch needs its manifest. What a person or a tool of this project puts there is looked
    for as files: those of the row's table, or for a folder with media anything at all.
    """
    downloads = catalog.downloads([row])
    missing = []
    for name in row.folders:
        download, folder = downloads.get(name), raw / name
        patterns = [row.files[split_of(stage)] for stage in row.stages] if name == row.folder else ["*"]
        by_hand = download is None or download.kind in {"manual", "none"}
        fetched = download is None or not fetches(download) or read_manifest(folder, download) is not None
        if not fetched or (by_hand and not all(_any(folder, pattern) for pattern in patterns)):
            missing.append(name)
    return missing


def unfinished_folders(row: Row, raw: Path) -> list[str]:
    """Raw folders of a row in which a download began and did not end: what lies there may be the half of it."""
    return [name for name in row.folders if (raw / name / STATE).exists() and not (raw / name / MANIFEST).exists()]


def is_downloaded(catalog: Catalog, row: Row, raw: Path) -> bool:
    """Whether everything that a row reads lies below `raw`."""
    return not missing_folders(catalog, row, raw)


def fetches(download: Download) -> bool:
    """Whether a download has a part that needs no person."""
    return bool(download.repo or download.urls or download.extract)


def _any(folder: Path, pattern: str) -> bool:
    return any(path.name != STATE for path in folder.glob(pattern))
