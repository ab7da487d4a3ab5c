"""What a build's report counts about pictures and answers that were used: peculiar ones, which may be mistakes.

Nothing is left out because of it. A part holds the counts of its shard, and the hashes by which equal pictures are
found in all shards.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from shards.schema import Example, Sample

LONG_ANSWER = 1024  # tokens; a longer answer is counted
LONG = f"answers of more than {LONG_ANSWER:,} tokens"
DUPLICATE = "pictures with the pixels of another file"


class OddityLog:
    """The oddities of one shard, as `to_json` stores them in its part."""

    def __init__(self) -> None:
        self.files: dict[int, tuple[int, str]] = {}  # identity of a picture's file -> hash of its pixels, first key
        self.kinds: dict[str, list[int]] = {}  # kind of picture -> places of its files in `files`
        self.long: list[str] = []  # keys of the samples with a long answer

    def add(self, example: Example, sample: Sample) -> None:
        """Add a sample and the example that it was made of."""
        for number, (image, noted) in enumerate(zip(example.images, sample.pictures, strict=False)):
            name = image.path or f"{example.source.file}\0{example.source.row}\0{number}"
            identity = xxhash.xxh3_64_intdigest(name.encode(errors="surrogateescape"))
            if identity not in self.files:
                for kind in noted.kinds:
                    self.kinds.setdefault(kind, []).append(len(self.files))
                self.files[identity] = (noted.pixels, sample.key)
        tokens = sample.variants[0]
        if (np.bincount(tokens["branch"][tokens["weight"] > 0], minlength=1) > LONG_ANSWER).any():
            self.long.append(sample.key)

    def to_json(self) -> dict[str, Any]:
        """The log as JSON; of each file its identity and hash (8 bytes each, base64) and its key."""
        hashes = np.array([(identity, pixels) for identity, (pixels, _) in self.files.items()], np.uint64)
        keys = [key for _, key in self.files.values()]
        return {
            "hashes": base64.b64encode(hashes.tobytes()).decode(),
            "keys": keys,
            "kinds": self.kinds,
            "long": self.long,
        }


def merge_oddities(logs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kind -> number and first key over all shards; a file that several shards use counts once."""
    found: dict[str, list[str]] = {}
    files: set[int] = set()
    first_of: dict[int, str] = {}  # hash of pixels -> the first key
    for log in logs:
        hashes = np.frombuffer(base64.b64decode(log.get("hashes", "")), np.uint64).reshape(-1, 2).tolist()
        keys, new = log.get("keys", []), set()
        for place, ((identity, pixels), key) in enumerate(zip(hashes, keys, strict=True)):
            if identity not in files:
                files.add(identity)
                new.add(place)
                if pixels in first_of:
                    found.setdefault(DUPLICATE, []).append(f"{key} and {first_of[pixels]}")
                first_of.setdefault(pixels, key)
        for kind, places in log.get("kinds", {}).items():
            found.setdefault(kind, []).extend(keys[place] for place in places if place in new)
        found.setdefault(LONG, []).extend(log.get("long", []))
    by_number = sorted(found.items(), key=lambda item: -len(item[1]))
    return {kind: {"number": len(keys), "first": keys[0]} for kind, keys in by_number if keys}
