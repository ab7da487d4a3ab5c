"""What scoring needs of a sample: the annotation of every branch, kept in stage "eval" as `KEY.asked.json.gz`.

Compressed, because masks are long and simple; webdataset's `decode()` opens it too. Scoring is `molmo2.eval`'s.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import pydantic

from shards.schema import Annotation, Chat, Choice, Points, Text, Tracks

MEMBER_NAME: Final = "asked.json.gz"
LARGEST: Final = 256 << 20  # bytes, unpacked
BYTES: Final = "base64"  # {BYTES: "..."} stands for bytes
KINDS: Final = {
    kind.__name__.lower(): pydantic.TypeAdapter[Annotation](kind) for kind in (Text, Choice, Chat, Points, Tracks)
}


class AskedError(ValueError):
    """Annotations that cannot be written, or bytes that are none."""


def asked_bytes(annotations: Sequence[Annotation]) -> bytes:
    """The member: equal annotations give equal bytes.

    Raises:
        AskedError: a fact is of a type that JSON does not have.
    """
    listed = [{"kind": type(annotation).__name__.lower(), **asdict(annotation)} for annotation in annotations]
    try:
        text = json.dumps(listed, default=_text_of_bytes, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise AskedError(f"facts of {annotations[0].style}: {error}") from None
    return gzip.compress(text.encode(), mtime=0)


def read_asked(data: bytes | memoryview) -> tuple[Annotation, ...]:
    """The annotations of a member.

    Raises:
        AskedError: no such member, or one that unpacks to more than `LARGEST`.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = unpacker.decompress(data, LARGEST)
        if unpacker.unconsumed_tail:
            raise AskedError(f"{MEMBER_NAME} unpacks to more than {LARGEST} bytes")
        listed = json.loads(text, object_hook=_bytes_of_text)
        return tuple(KINDS[one.pop("kind")].validate_python(one) for one in listed)
    except (zlib.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise AskedError(f"{MEMBER_NAME}: {type(error).__name__}: {error}") from None


def _text_of_bytes(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r} is nothing that JSON has")


def _bytes_of_text(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[BYTES], validate=True) if value.keys() == {BYTES} else value
