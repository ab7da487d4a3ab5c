"""What scoring needs of a sample, to bytes and back."""

import gzip
import json
from decimal import Decimal

import pytest

from shards import asked
from shards.asked import AskedError, asked_bytes, read_asked
from shards.schema import Chat, Choice, PointGroup, Points, Text, TrackGroup, Tracks, Turn

ALL = (
    Text(style="vqa", question="What?", answer="a cat", facts={"answers": ["a cat", "cat"], "mask": b"\x89PNG\x00"}),
    Choice(style="mc", question="Which?", options=("a", "b"), answer=1, labelled=False),
    Chat(style="chat", turns=(Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello"))),
    Points(style="pointing", label="cat", groups=(PointGroup(at=1, points=((0.25, 0.5),)),), facts={"masks": [[True]]}),
    Tracks(style="track", label="cat", fps=2.0, groups=(TrackGroup(time=0.5, objects=((3, 0.1, 0.2),)),)),
)


@pytest.mark.slow
def test_annotations_come_back_as_they_were() -> None:
    assert read_asked(asked_bytes(ALL)) == ALL
    assert asked_bytes(ALL) == asked_bytes(ALL)
    assert read_asked(memoryview(asked_bytes(ALL[:1]))) == ALL[:1]
    masks = Text(style="x", answer="", facts={"mask": [[False] * 1000] * 1000})
    assert len(asked_bytes([masks])) < 20_000  # of 6 million characters


def test_facts_that_json_does_not_have_are_named() -> None:
    with pytest.raises(AskedError, match="facts of vqa: Decimal"):
        asked_bytes([Text(style="vqa", answer="", facts={"price": Decimal("1.5")})])


NONE = [b"", b"no gzip", *(gzip.compress(data, mtime=0) for data in (b"[{}]", b"{", b'[{"kind": "text"}]', b"3"))]


@pytest.mark.parametrize("data", NONE)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(AskedError, match=r"asked\.json\.gz"):
        read_asked(data)


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "LARGEST", 1000)
    with pytest.raises(AskedError, match="more than 1000 bytes"):
        read_asked(gzip.compress(json.dumps(["x" * 100_000]).encode()))
