"""The annotation of every branch of a sample, stored in stage "eval" as member `KEY.asked.json.gz` for scoring.

The JSON is compressed because masks are long and repetitive; webdataset's `decode()` reads it too.
The scores are computed in `molmo2.eval`.
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

from shards.format import ASKED_NAME
from shards.schema import Annotation, Chat, Choice, Points, Text, Tracks

LARGEST: Final = 256 << 20  # bytes; a member that unpacks to more is refused
BYTES: Final = "base64"  # JSON has no bytes: they are stored as {BYTES: "<base64>"}
KINDS: Final = {
    kind.__name__.lower(): pydantic.TypeAdapter[Annotation](kind) for kind in (Text, Choice, Chat, Points, Tracks)
}


class AskedError(ValueError):
    """Annotations cannot be stored as JSON, or a member cannot be read as annotations."""


def asked_bytes(annotations: Sequence[Annotation]) -> bytes:
    """Encode annotations as the bytes of the member; equal annotations give equal bytes.

    Raises:
        AskedError: a fact has a type that cannot be stored as JSON.
    """
    records = [{"kind": type(annotation).__name__.lower(), **asdict(annotation)} for annotation in annotations]
    try:
        text = json.dumps(records, default=_text_of_bytes, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise AskedError(f"facts of {annotations[0].style}: {error}; correct `facts` of the catalog row") from None
    return gzip.compress(text.encode(), mtime=0)


def read_asked(data: bytes | memoryview) -> tuple[Annotation, ...]:
    """Decode the annotations of a member.

    Raises:
        AskedError: the bytes are not such a member, or unpack to more than `LARGEST`.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = unpacker.decompress(data, LARGEST)
        if unpacker.unconsumed_tail:
            raise AskedError(f"{ASKED_NAME} unpacks to more than {LARGEST} bytes; the sample is damaged")
        records = json.loads(text, object_hook=_bytes_of_text)
        return tuple(KINDS[record.pop("kind")].validate_python(record) for record in records)
    except (zlib.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise AskedError(f"{ASKED_NAME}: {type(error).__name__}: {error}") from None


def _text_of_bytes(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} {str(value)[:40]!r} cannot be stored as JSON")


def _bytes_of_text(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[BYTES], validate=True) if value.keys() == {BYTES} else value
