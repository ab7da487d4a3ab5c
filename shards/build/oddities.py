"""What a build's report counts about pictures, points, questions and answers that were used: they may be mistakes.

Nothing is left out because of it. A part holds the counts of its shard, the hashes by which equal pictures are found in
all shards, and those by which equal questions are found in the shards of another stage.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import xxhash

from shards.format import INDEX_NAME, parse_index
from shards.schema import Annotation, Chat, Example, Points, Sample, Tracks
from shards.storage.base import Storage

LONG_ANSWER = 1024  # tokens; a longer answer is counted
LONG = f"answers of more than {LONG_ANSWER:,} tokens"
DUPLICATE = "pictures with the pixels of another file"
EDGE = "samples with a point on the edge of the picture, where points up to 1 % outside are moved"
SHARED = "samples that ask what a held-out sample asks, about the same pictures, video or text"
MOST_SHOWN = 6  # pictures of a kind that a page shows


class _File(NamedTuple):
    """A file of a picture: a hash of its pixels, and the key and place of the first sample that uses it.

    The place is the number of the sample in its shard, and that of the picture in the sample.
    """

    pixels: int
    key: str
    place: tuple[int, int]


class OddityLog:
    """The oddities of one shard, as `to_json` stores them in its part."""

    def __init__(self) -> None:
        self.num_samples = 0
        self.files: dict[int, _File] = {}  # by the identity of the file
        self.kinds: dict[str, list[int]] = {}  # kind of picture -> places of its files in `files`
        self.samples: dict[str, list[str]] = {}  # kind of sample -> keys
        self.asked: dict[str, list[int]] = {}  # key -> hashes of what the sample asks about which media

    def add(self, example: Example, sample: Sample) -> None:
        """Add a sample and the example that it was made of."""
        for number, (image, noted) in enumerate(zip(example.images, sample.pictures, strict=False)):
            name = image.path or f"{example.source.file}\0{example.source.row}\0{number}"
            identity = xxhash.xxh3_64_intdigest(name.encode(errors="surrogateescape"))
            if identity not in self.files:
                for kind in noted.kinds:
                    self.kinds.setdefault(kind, []).append(len(self.files))
                self.files[identity] = _File(noted.pixels, sample.key, (self.num_samples, number))
        tokens = sample.variants[0]
        if (np.bincount(tokens["branch"][tokens["weight"] > 0], minlength=1) > LONG_ANSWER).any():
            self.samples.setdefault(LONG, []).append(sample.key)
        if any(x in (0, 1) or y in (0, 1) for annotation in example.annotations for x, y in _points(annotation)):
            self.samples.setdefault(EDGE, []).append(sample.key)
        media = [example.video, *(noted.pixels for noted in sample.pictures)]
        questions = {_question(annotation) for annotation in example.annotations}
        if example.video is None and not sample.pictures:
            questions.discard("")
        texts = (f"{question}\0{media}" for question in questions)
        self.asked[sample.key] = sorted(xxhash.xxh3_64_intdigest(t.encode(errors="surrogatepass")) for t in texts)
        self.num_samples += 1

    def to_json(self) -> dict[str, Any]:
        """The log as JSON; hashes are of 8 bytes each, in base64."""
        return {
            "hashes": _encoded([value for identity, file in self.files.items() for value in (identity, file.pixels)]),
            "keys": [file.key for file in self.files.values()],
            "places": [file.place for file in self.files.values()],
            "kinds": self.kinds,
            "samples": self.samples,
            "asked": {key: _encoded(hashes) for key, hashes in self.asked.items()},
        }


def _points(annotation: Annotation) -> Iterable[tuple[float, float]]:
    if isinstance(annotation, Points):
        return (point for group in annotation.groups for point in group.points)
    if isinstance(annotation, Tracks):
        return ((x, y) for group in annotation.groups for _, x, y in group.objects)
    return ()


def _question(annotation: Annotation) -> str:
    """The question of an annotation without differences of case and spaces; that of a caption is empty."""
    if isinstance(annotation, Chat):
        text = next((turn.text for turn in annotation.turns if turn.role == "user"), "")
    elif isinstance(annotation, Tracks):
        text = annotation.label
    else:
        text = f"{annotation.question} {annotation.label}" if isinstance(annotation, Points) else annotation.question
    return " ".join(text.casefold().split())


def _encoded(hashes: list[int]) -> str:
    return base64.b64encode(np.array(hashes, np.uint64).tobytes()).decode()


def _decoded(text: str) -> list[int]:
    hashes: list[int] = np.frombuffer(base64.b64decode(text), np.uint64).tolist()
    return hashes


def merge_oddities(shards: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What is odd in all shards, each given as its number of samples and its log.

    The result is kind -> number, first key, and for pictures those to show, as (sample of the dataset, picture of the
    sample). A file that several shards use counts once.
    """
    keys: dict[str, list[str]] = {}
    shown: dict[str, list[tuple[int, int]]] = {}
    files: set[int] = set()
    first_of: dict[int, tuple[str, tuple[int, int]]] = {}  # hash of pixels -> key and place of the first file
    start = 0
    for num_samples, log in shards:
        hashes = _decoded(log.get("hashes", ""))
        places = [(start + sample, number) for sample, number in log.get("places", [])]
        new = set()
        for i, (identity, pixels) in enumerate(zip(hashes[::2], hashes[1::2], strict=True)):
            if identity in files or not places:
                continue
            files.add(identity)
            new.add(i)
            key, place = log["keys"][i], places[i]
            if pixels in first_of:
                keys.setdefault(DUPLICATE, []).append(f"{key} and {first_of[pixels][0]}")
                shown.setdefault(DUPLICATE, []).extend((first_of[pixels][1], place))
            first_of.setdefault(pixels, (key, place))
        for kind, numbers in log.get("kinds", {}).items():
            chosen = [i for i in numbers if i in new]
            keys.setdefault(kind, []).extend(log["keys"][i] for i in chosen)
            shown.setdefault(kind, []).extend(places[i] for i in chosen)
        for kind, of_samples in log.get("samples", {}).items():
            keys.setdefault(kind, []).extend(of_samples)
        start += num_samples
    by_number = sorted(keys.items(), key=lambda item: -len(item[1]))
    return {
        kind: {"number": len(found), "first": found[0], "shown": shown.get(kind, [])[:MOST_SHOWN]}
        for kind, found in by_number
        if found
    }


def shared_questions(dataset: Storage, other: Storage) -> list[str]:
    """Keys of the samples that ask what a sample of another dataset asks, about the same pictures or video.

    Either dataset may be unfinished; the result is then empty.
    """
    others = {value for hashes in _asked(other).values() for value in hashes}
    return [key for key, hashes in _asked(dataset).items() if others.intersection(hashes)] if others else []


def _asked(storage: Storage) -> dict[str, list[int]]:
    try:
        index = parse_index(storage.read(INDEX_NAME), f"{storage.root}/{INDEX_NAME}")
        parts = [json.loads(storage.read(f"{shard.name}.part.json")) for shard in index.shards]
    except FileNotFoundError:
        return {}
    logs = [part.get("oddities", {}).get("asked", {}) for part in parts]
    return {key: _decoded(text) for log in logs for key, text in log.items()}
