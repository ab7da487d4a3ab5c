"""What a file of rows holds, judged by its first bytes and not by its name; its content, uncompressed and as UTF-8.

Compressed files and UTF-16 or UTF-32 text are converted to a temporary copy, which is in memory while it is small.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any, cast

CHUNK = 1 << 20
STREAM_ABOVE = 256 << 20  # bytes; a larger content is not held in memory as a whole
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
DAMAGED_CONTENT = (EOFError, zlib.error, lzma.LZMAError)  # raised by decompression, besides OSError and ValueError


def binary_kind(file: Path) -> str | None:
    """The kind "parquet" or "arrow" if the content is that and not compressed, else None.

    Raises:
        OSError: the file cannot be read.
    """
    with open(file, "rb") as opened:
        head = opened.read(8)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "arrow" if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) else None


def is_compressed(file: Path) -> bool:
    """Whether the content is gzip, bzip2 or xz."""
    with open(file, "rb") as opened:
        return opened.read(6).startswith(tuple(COMPRESSED))


def open_content(file: Path, *, text: bool) -> IO[bytes]:
    """Open the content of a file: uncompressed, and with `text` as UTF-8 without a byte order mark.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: the file cannot be read or uncompressed.
        UnicodeDecodeError: the text is in none of the Unicode encodings.
    """
    opened: IO[bytes] = open(file, "rb")
    head = opened.read(6)
    opened.seek(0)
    for magic, opener in COMPRESSED.items():
        if head.startswith(magic):
            with opened, opener(opened) as compressed:
                copy = _copy(cast(IO[bytes], compressed))
            opened = copy
            head = opened.read(6)
            opened.seek(0)
            break
    if head.startswith(b"PK\3\4"):
        opened.close()
        raise ValueError("it is a zip archive; unpack it, or name it in `download.extract`")
    encoding = json.detect_encoding(head[:4]) if text else "utf-8"
    if encoding == "utf-8":
        return opened
    if encoding == "utf-8-sig":
        opened.seek(len(codecs.BOM_UTF8))
        return opened
    with opened:
        return _copy(cast(IO[bytes], codecs.EncodedFile(opened, "utf-8", encoding)))


def _copy(source: IO[bytes]) -> IO[bytes]:
    target = cast(IO[bytes], tempfile.SpooledTemporaryFile(STREAM_ABOVE))
    try:
        shutil.copyfileobj(source, target, CHUNK)
    except BaseException:
        target.close()
        raise
    target.seek(0)
    return target
