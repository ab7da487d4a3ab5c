"""Finding the members of a damaged tar by their headers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from shards.format import BLOCK


def whole_headers(data: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, key) of every member in `data` that has a tar header with a valid checksum.

    Damage elsewhere in `data` is ignored, and so is a header whose size is negative: it would lead back to itself. The
    end is the expected offset of the next header; a truncated member ends with `data`.
    """
    position = 0
    while position + BLOCK <= len(data):
        try:
            member = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            member = None
        if member is None or member.size < 0:
            position += BLOCK
            continue
        end = position + BLOCK + -(-member.size // BLOCK) * BLOCK
        yield position, min(end, len(data)), member.name.split(".", 1)[0]
        position = end
