"""Download of a Hugging Face dataset repository: its files are listed at a pinned commit, then fetched and checked.

`huggingface_hub` transfers the files, resumes downloads, and finds the token (HF_TOKEN, or `hf auth login`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pydantic
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects

from shards.download.manifest import File, Listing


class DownloadError(ValueError):
    """A download cannot continue without an action of the user."""


def list_files(repo: str, revision: str | None, include: Sequence[str]) -> Listing:
    """List the files that match the globs, at the current commit of `revision` (None: the newest).

    Raises:
        DownloadError: the repository does not exist or cannot be accessed, there is no network, or no file matches.
    """
    api = HfApi()
    try:
        commit = api.dataset_info(repo, revision=revision).sha
        entries = list(api.list_repo_tree(repo, revision=commit, recursive=True, repo_type="dataset"))
    except Exception as error:
        raise _explained(error, repo, revision) from None
    wanted = set(filter_repo_objects((e.path for e in entries), allow_patterns=patterns(include)))
    try:
        files = [
            File(path=entry.path, bytes=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
            for entry in sorted(entries, key=lambda e: e.path)
            if isinstance(entry, RepoFile) and entry.path in wanted
        ]
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DownloadError(f"{repo}@{commit}: {reason}; exclude it with `include` in the catalog") from None
    if not files or commit is None:
        raise DownloadError(f"{repo}@{commit}: no file matches {', '.join(include)}; correct `include` in the catalog")
    return Listing(repo=repo, commit=commit, files=tuple(files))


def patterns(include: Sequence[str]) -> list[str]:
    """Globs for the Hub's matching: its "**/" does not match zero folders, so each pattern is also given without it."""
    return sorted({*include, *(pattern.removeprefix("**/") for pattern in include)})


def fetch_files(listing: Listing, folder: Path, workers: int = 4) -> None:
    """Fetch the missing files; check their sizes and, if the Hub lists them, their hashes.

    Raises:
        DownloadError: there is no access or no network, or a file differs from the listing.
    """
    names = [_literal(file.path) for file in listing.files]
    try:
        snapshot_download(
            listing.repo,
            repo_type="dataset",
            revision=listing.commit,
            allow_patterns=names,
            local_dir=folder,
            max_workers=workers,
        )
    except Exception as error:
        raise _explained(error, listing.repo, listing.commit) from None
    for file in listing.files:
        if fault := _fault(folder / file.path, file):
            (folder / file.path).unlink(missing_ok=True)  # so that the next run fetches it again
            raise DownloadError(f"{folder / file.path}: {fault}; it was removed, run the same command again")


def _literal(path: str) -> str:
    """A glob that matches exactly this path."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _fault(path: Path, file: File) -> str | None:
    if not path.is_file():
        return "was not fetched"
    if path.stat().st_size != file.bytes:
        return f"{path.stat().st_size} bytes, the Hub lists {file.bytes}"
    if file.sha256 is None:
        return None
    with path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if sha256 == file.sha256 else f"sha256 {sha256[:16]}, the Hub lists {file.sha256[:16]}"


def _explained(error: Exception, repo: str, revision: str | None) -> Exception:
    """Turn an error of the Hub into a `DownloadError` with a remedy; other errors are returned unchanged."""
    page = f"https://huggingface.co/datasets/{repo}"
    if isinstance(error, GatedRepoError):
        return DownloadError(
            f"{repo} is gated: log in at {page}, accept its licence, then `hf auth login` or set HF_TOKEN and run again"
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"{repo}: no revision {revision!r}; correct `revision` in the catalog; if this is the commit of an earlier "
            "download, --update moves to the newest one"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DownloadError(f"{repo}: no such dataset on the Hub, or a private one; see {page}, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return DownloadError(f"{repo}: HF_HUB_OFFLINE is set; unset it to download")
    transport = type(error).__module__.partition(".")[0].startswith("httpx")  # an error of the HTTP client
    if transport or isinstance(error, HfHubHTTPError | LocalEntryNotFoundError | OSError):
        text = str(error).strip() or type(error).__name__
        return DownloadError(f"{repo}: {text.splitlines()[0]}; the same command continues where this one ended")
    return error
