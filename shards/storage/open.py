"""The storage behind a URL or a path."""

from __future__ import annotations

from pathlib import Path

from shards.storage.base import Storage
from shards.storage.local import LocalStorage


def open_storage(url: str | Path) -> Storage:
    """Open the storage behind a URL or a path.

    Raises:
        ValueError: the scheme is not supported, or its packages are not installed.
    """
    text = str(url)
    if text.startswith("s3://"):
        try:
            from shards.storage.s3 import S3Storage
        except ImportError as error:
            raise ValueError(f"{text}: {error}; buckets need the extra: pip install -e '.[s3]'") from None
        return S3Storage(text)
    if text.startswith(("https://", "http://", "hf://")):
        from shards.storage.web import open_web

        return open_web(text)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise ValueError(
            f"{text}: unsupported scheme; give a local directory, or a URL with file://, s3://, https:// or hf://"
        )
    return LocalStorage(text)
