"""Images inside a row: raw bytes, base64, and data: URLs (RFC 2397)."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from shards.schema import RejectedError

_SHORTEST = 64  # characters; a shorter text is a name, never an image as base64
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def embedded_image(value: Any, max_bytes: int) -> bytes | None:
    """The bytes of an image that a row holds itself; None if the value is a path, a URL or anything else.

    Raises:
        RejectedError: a data: URL is malformed or empty, or the image has more than `max_bytes`.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        data: bytes | None = bytes(value) or None
    elif isinstance(value, str) and value[:5].lower() == "data:":
        _check_size(len(value) * 3 // 4, max_bytes)  # before it is decoded
        data = _data_url(value)
    elif isinstance(value, str) and len(value) >= _SHORTEST:
        data = _plain_base64(value)
    else:
        data = None
    if data is not None:
        _check_size(len(data), max_bytes)
    return data


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RejectedError(f"media: an embedded image of {size} bytes, at most {max_bytes} are read")


def _data_url(url: str) -> bytes:
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise RejectedError(f"media: a data: URL without a comma: {url[:40]!r}")
    if head.rpartition(";")[2].strip().lower() == "base64":
        data = _decode(unquote(body))
        if data is None:
            raise RejectedError(f"media: a data: URL whose base64 is broken: {url[:40]!r}")
    else:
        data = unquote_to_bytes(body)
    if not data:
        raise RejectedError(f"media: a data: URL without content: {url[:40]!r}")
    return data


def _plain_base64(text: str) -> bytes | None:
    """The image that a base64 text without a prefix holds; None if it does not hold one."""
    start = _decode(text[:_SHORTEST])
    return _decode(text) if start is not None and start.startswith(_MAGIC) else None


def _decode(text: str) -> bytes | None:
    """Base64 in its usual or URL-safe alphabet, with or without padding and line breaks."""
    text = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
