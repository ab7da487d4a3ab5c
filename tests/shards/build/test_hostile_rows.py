"""Rows that mean harm, or are odd: each is one recorded and counted reject, and the honest rows beside it are built."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_cases import QUESTIONS, factory
from video_cases import encode

from shards.build.builder import build_dataset
from shards.catalog import Row, Stage, load_catalog
from shards.format import DatasetIndex
from shards.sources.parquet import SourceError

Rejects = list[dict[str, Any]]
HONEST = {"image": "1.png", "question": "What colour?", "answer": "Red."}


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header names these sizes, in grey with 8 bits, whatever it holds."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def photo(exif: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (60, 40), "red").save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def built(raw: Path, folder: Path, row: dict[str, Any], stage: Stage = "sft") -> tuple[DatasetIndex, Rejects]:
    """Build the dataset "mine" of a folder; its index and its rejects."""
    settings = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1, "examples_per_shard": 4})
    made = build_dataset(
        Row.model_validate(row),
        stage,
        settings,
        factory(raw, stage, 1),
        raw=folder / "mine",
        out=str(folder / "out"),
        reject_budget=1.0,
    )
    assert made.index is not None
    return made.index, [json.loads(line) for line in (folder / "out/rejects.jsonl").read_text().splitlines()]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    PIL.Image.new("RGB", (60, 40), "red").save(folder / "1.png")
    (folder / "huge.png").write_bytes(png(20_000, 20_000))
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    return folder


def nested(depth: int) -> str:
    return "[" * depth + '"a"' + "]" * depth


LONG, DEEP = "x" * 100_000, 800  # json.loads itself refuses more levels
# a row in JSON, and what its reject says
ROWS: dict[str, tuple[str | dict[str, Any], str]] = {
    "a name of 256 characters": ({"image": "n" * 256 + ".png"}, "File name too long"),
    "a path of 100,000 characters": ({"image": f"a/{LONG}"}, "File name too long"),
    "a name with a zero byte": ({"image": "1\0.png"}, "zero byte"),
    "a long data URL of no image": ({"image": data_url(bytes(3_000_000))}, "not a readable image"),
    "a long data URL of broken base64": ({"image": f"data:image/png;base64,{LONG}!"}, "base64 is broken"),
    "a data URL without a comma": ({"image": f"data:{LONG}"}, "without a comma"),
    "a data URL of 400 megapixels": ({"image": data_url(png(20_000, 20_000))}, "400000000 pixels"),
    "a file of 400 megapixels": ({"image": "huge.png"}, "400000000 pixels"),
    "an image of 2^31 x 2^31": ({"image": data_url(png(2**31 - 1, 2**31 - 1))}, "pixels"),
    "an image without pixels": ({"image": data_url(png(0, 0))}, "media:"),
    "a folder": ({"image": "folder.png"}, "does not exist"),
    "a link to itself": ({"image": "loop.png"}, "media: "),
    "a path to the outside": ({"image": "../../etc/passwd"}, "media:"),
    "a URL of another scheme": ({"image": "gopher://x/1.png"}, "scheme 'gopher'"),
    "a URL of a broken address": ({"image": "http://[::1/1.png"}, "not a URL"),
    "a lone surrogate in a question": ('{"image": "1.png", "question": "\\ud83d?", "answer": "b"}', "encoded as UTF-8"),
    "a lone surrogate in a name": ('{"image": "\\udcff.png", "question": "a", "answer": "b"}', "encoded as UTF-8"),
    "a lone surrogate in a key": ('{"image": "1.png", "question": {"\\udcff": 1}, "answer": "b"}', "encoded as UTF-8"),
    "bytes that are a text": ({"image": {"bytes": "str"}}, "does not exist"),
    "bytes that are a long text": ({"image": {"bytes": LONG}}, "media:"),
    "bytes that are a number": ({"image": {"bytes": 3}}, "no image in the row"),
    "bytes that are a list": ({"image": {"bytes": [137, 80]}}, "media:"),
    "a number for a name": ({"image": 10**300}, "no image in the row"),
    "true for a name": ({"image": True}, "no image in the row"),
    "a deep question": (f'{{"image": "1.png", "question": {nested(DEEP)}, "answer": "b"}}', ""),
    "a deep image": (f'{{"image": {nested(DEEP)}, "question": "a", "answer": "b"}}', ""),
    "deep objects": ('{"image": "1.png", "answer": "b", "question": ' + '{"a":' * DEEP + "1" + "}" * (DEEP + 1), ""),
    "a question that is an object": ({"question": {"text": "a"}}, "no question with an answer"),
    "a key twice": ('{"image": "1.png", "question": "a", "question": "b", "answer": "c"}', "several times"),
    "a long question": ({"question": LONG * 10}, "tokens"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_hostile_row_is_one_reject_between_honest_ones(raw: Path, tmp_path: Path, mine: Path, kind: str) -> None:
    value, reason = ROWS[kind]
    lines = [json.dumps(HONEST)] * 6
    lines[2] = value if isinstance(value, str) else json.dumps(HONEST | value)
    (mine / "rows.jsonl").write_text("\n".join(lines))
    index, rejects = built(raw, tmp_path, QUESTIONS)
    faults = [reject for reject in rejects if not reject["omitted"]]
    assert [(reject["file"], reject["row"]) for reject in faults] == [("rows.jsonl", 2)]
    assert reason in faults[0]["reason"] and len(faults[0]["reason"]) < 1100
    assert (index.totals.samples, index.totals.rejects) == (5, len(rejects))


CHOICE = "The Question is: Which?\nThe Options are: "
VIDEO = QUESTIONS | {"converter": "video_embedded_choice", "options": {}}
VIDEO |= {"columns": {"video": "video", "question": "question", "answer": "answer"}}
OPTIONS: dict[str, tuple[Any, Any]] = {  # options of a question, and its answer
    "a bare apostrophe": ("['it's', 'b']", 1),
    "an open bracket": ("['a', 'b'" + "[" * 5000 + "]", 1),
    "5,000 minus signs": ("[" + "-" * 5000 + "1]", 1),
    "100,000 brackets": ("[" * 100_000 + "]" * 100_000, 1),
    "a call": ("[__import__('os').system('true')]", 1),
    "a set of lists": ("[{[]}]", 1),
    "a zero byte": ("['a\0', 'b']", 1),
    "bytes": ("[b'a', b'b']", 1),
    "an answer beyond": ("['a', 'b']", 10**400),
    "an infinite answer": ("['a', 'b']", "Infinity"),
    "an answer that is a list": ("['a', 'b']", [[1]]),
    "5,000 digits": ("[" + "9" * 5000 + "]", 1),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_hostile_list_of_options_is_one_reject(raw: Path, tmp_path: Path, mine: Path, kind: str) -> None:
    encode(mine / "1.mp4")
    options, answer = OPTIONS[kind]
    honest = {"video": "1.mp4", "question": f"{CHOICE}['a', 'b']", "answer": "1"}
    rows = [honest] * 4
    rows[1] = honest | {"question": CHOICE + options, "answer": answer}
    (mine / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index, rejects = built(raw, tmp_path, VIDEO)
    assert [(reject["row"], reject["omitted"]) for reject in rejects] == [(1, False)]
    assert (index.totals.samples, index.totals.rejects) == (3, 1)


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with entries of (tag, type, count, four bytes)."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


EXIF = {
    "cut": b"Exif\0\0II",
    "no TIFF": b"Exif\0\0" + b"\xff" * 40,
    "an offset beyond": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "an orientation of 99": exif((0x0112, 3, 1, b"\x63\0\0\0")),
    "an orientation that is a text": exif((0x0112, 2, 4, b"six\0")),
    "four billion orientations": exif((0x0112, 3, 2**32 - 1, b"\x08\0\0\0")),
    "an orientation divided by zero": exif((0x0112, 5, 1, b"\0\0\0\0")),
    "a directory within itself": exif((0x8769, 4, 1, b"\x08\0\0\0")),
    "60,000 bytes": b"Exif\0\0" + bytes(range(256)) * 230,
}


def test_odd_exif_counts_as_none(raw: Path, tmp_path: Path, mine: Path) -> None:
    images = [{"bytes": photo(data)} for data in (b"", *EXIF.values())]
    table = {"image": images, "question": ["What?"] * len(images), "answer": ["Red."] * len(images)}
    pq.write_table(pa.table(table), mine / "rows.parquet")
    index, rejects = built(raw, tmp_path, QUESTIONS | {"files": {"train": "rows.parquet"}})
    assert (index.totals.samples, rejects) == (len(images), [])


@pytest.mark.parametrize("values", [["str", "x" * 5000], [0, 3], [[1], [2, 3]], [True, False]], ids=range(4))
def test_bytes_of_another_type_are_rejects(raw: Path, tmp_path: Path, mine: Path, values: list[Any]) -> None:
    for number, image in enumerate({"bytes": value} for value in values):
        pq.write_table(pa.table({"image": [image], "question": ["a"], "answer": ["b"]}), mine / f"rows{number}.parquet")
    good = {"image": [{"bytes": photo()}], "question": ["a"], "answer": ["b"]}
    pq.write_table(pa.table(good), mine / "rows9.parquet")
    index, rejects = built(raw, tmp_path, QUESTIONS | {"files": {"train": "rows*.parquet"}})
    assert (index.totals.samples, index.totals.rejects) == (1, 2)
    assert [reject["file"] for reject in rejects] == ["rows0.parquet", "rows1.parquet"]


@pytest.mark.parametrize("depth", [30, 250, 450, 475, 500, DEEP])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'], ids=["lists", "objects"])
def test_deep_facts_are_stored_or_one_reject(raw: Path, tmp_path: Path, mine: Path, depth: int, brackets: str) -> None:
    value = brackets[:-1] * depth + "1" + brackets[-1] * depth
    lines = [json.dumps(HONEST | {"extra": 1})] * 3 + [json.dumps(HONEST)[:-1] + f', "extra": {value}}}']
    (mine / "rows.jsonl").write_text("\n".join(lines))
    row = QUESTIONS | {"stages": ["eval"], "files": {"validation": "rows.jsonl"}, "facts": {"extra": "extra"}}
    index, rejects = built(raw, tmp_path, row, "eval")
    assert [reject["row"] for reject in rejects] == [3][: len(rejects)]
    assert index.totals.samples == 4 - len(rejects)


@pytest.mark.parametrize("grouped", [{"group_by": "image"}, {"held_out": 0.5, "metric": "exact_match"}], ids=str)
@pytest.mark.parametrize("image", ['"\\udcff.png"', '["\\udcff.png"]', '{"a": [NaN]}', nested(DEEP), '{"\\udcff": 1}'])
def test_rows_are_grouped_and_held_out_whatever_they_hold(
    raw: Path, tmp_path: Path, mine: Path, grouped: dict[str, Any], image: str
) -> None:
    lines = [json.dumps(HONEST)] * 4 + [f'{{"image": {image}, "question": "a", "answer": "b"}}'] * 2
    if "held_out" in grouped:  # half of the images are held out
        lines += [json.dumps(HONEST | {"image": f"./{'/' * n}1.png"}) for n in range(40)]
    (mine / "rows.jsonl").write_text("\n".join(lines))
    index, rejects = built(raw, tmp_path, QUESTIONS | grouped)
    assert index.totals.samples > 0 and {reject["row"] for reject in rejects} <= {4, 5}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on the disk"])
def test_json_that_is_too_deep_to_parse_is_an_error_of_its_table(
    raw: Path, tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, name: str, large: bool
) -> None:
    monkeypatch.setattr("shards.sources.json_table.STREAM_ABOVE", 0 if large else 1 << 30)
    lines = [json.dumps(HONEST), json.dumps(HONEST), "[" * 200_000]
    (mine / name).write_text("\n".join(lines) if name == "rows.jsonl" else f"[{', '.join(lines)}]")
    with pytest.raises(SourceError, match="line 3" if name == "rows.jsonl" else "recursion"):
        built(raw, tmp_path, QUESTIONS | {"files": {"train": name}})
