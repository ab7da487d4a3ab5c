"""Files of rows are read by their content: other suffixes, encodings, compressions, and large sizes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.catalog import TableFormat
from shards.convert import reading
from shards.sources import json_table, parquet, streamed
from shards.sources.parquet import MissingSourceError, SourceError
from shards.sources.tables import Table, open_table

ROWS = [{"id": "a", "n": 1}, {"id": "ü🙂", "n": 2}, {"id": "c\u2028d", "n": 3}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False)


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


def arrow_file() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def values(table: Table, numbers: list[int]) -> list[dict[str, Any]]:
    return [row for _, row in table.read(numbers, ["id", "n"])]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES.encode()),
        ("array.jsonl", ARRAY.encode()),
        ("pretty.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("marked.json", ARRAY.encode("utf-8-sig")),
        ("utf16.jsonl", LINES.encode("utf-16")),
        ("utf16be.json", ARRAY.encode("utf-16-be")),
        ("utf32.json", ARRAY.encode("utf-32")),
        ("lines.jsonl.gz", gzip.compress(LINES.encode())),
        ("gzip.json", gzip.compress(ARRAY.encode("utf-16"))),
        ("rows.json.bz2", bz2.compress(LINES.encode())),
        ("rows.jsonl.xz", lzma.compress(LINES.encode())),
        ("parquet.json", parquet_bytes()),
        ("gzip.parquet", gzip.compress(parquet_bytes())),
        ("file.arrow", arrow_file()),
        ("noname", parquet_bytes()),
    ],
)
def test_the_content_decides(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    table = open_table(tmp_path, name, ["id", "n"])
    assert len(table) == 3
    assert values(table, [2, 0, 1]) == [ROWS[2], ROWS[0], ROWS[1]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_csv_may_have_large_fields(tmp_path: Path, encoding: str) -> None:
    with open(tmp_path / "t.tsv", "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter="\t").writerows([["id", "n"], ["ü" * 300_000, "line\nbreak"]])
    assert values(open_table(tmp_path, "t.tsv", ["id", "n"]), [0]) == [{"id": "ü" * 300_000, "n": "line\nbreak"}]


def test_one_row_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(ROWS[0]) + "\n")
    assert values(open_table(tmp_path, "t.json", ["id", "n"]), [0]) == [ROWS[0]]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.jsonl", LINES.encode() + b"\n{", "line 4"),
        ("t.json", b"", "empty"),
        ("t.csv", "id,n\nä,1\n".encode("latin-1"), "not UTF-8.*iconv"),
        ("t.json.gz", gzip.compress(LINES.encode())[:-20], "not a readable json file"),
        ("t.json", b"PK\3\4zip", "zip archive; unpack it"),
    ],
)
def test_broken_content_is_named_with_its_remedy(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=match):
        open_table(tmp_path, name, ["id", "n"])


@pytest.mark.parametrize("limit", [1 << 20, 10], ids=["small", "large"])
@pytest.mark.parametrize(
    ("content", "form", "match"),
    [
        # The decoder itself would name line 5, where it no longer finds a comma.
        ('{"id": "a"}\n\n{"id": "b"}\n{"id": "c"\n{"id": "d"}\n', {}, r"line 4: Expecting ',' delimiter: column"),
        ('a note\n{"id": "a"}\n{"id": }\n', {"skip": 1}, r"line 3: Expecting value: column 8"),
        ('["id"]\n["a"]\n["b"\n', {"names_first": True}, r"line 3: Expecting ',' delimiter"),
        ('{"id": "a"}\n["b"]\n', {}, r"line 2: expected an object with columns, found list"),
    ],
)
def test_a_broken_line_is_named_as_an_editor_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, content: str, form: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(json_table, "STREAM_ABOVE", limit)
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(SourceError, match=match) as error:
        open_table(tmp_path, "t.jsonl", ["id"], TableFormat(**form))
    assert "fetch" not in str(error.value)


@pytest.mark.parametrize(("name", "column"), [("t.jsonl", "id"), ("t.parquet", "id"), ("rows.jsonl", "other")])
def test_only_downloaded_files_are_to_be_fetched_again(tmp_path: Path, name: str, column: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 1}\n{')
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(SourceError, match=r"correct (it|`columns`)") as own:
        open_table(tmp_path, name, [column])
    assert "fetch" not in str(own.value)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SourceError, match=r"fetch (it again|the revision)"):
        open_table(tmp_path, name, [column])


def csv_bytes() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([["id", "n"], ["x\ny", 1], ["ü", 2], ["c", 3]])
    return b"a line before\n" + text.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("t.jsonl", LINES.encode(), {}),
        ("t.json", LINES.encode("utf-8-sig"), {}),
        ("t.json", ARRAY.encode(), {}),
        ("t.jsonl", ARRAY.encode("utf-16"), {}),
        ("t.jsonl", b'["id", "n"]\n["a", 1]\n\n["b", 2]\n["c", 3]', {"names_first": True}),
        ("t.json", json.dumps({"r": ROWS}).encode(), {"records": "r"}),
        ("t.json", json.dumps({"k": ROWS[0], "l": ROWS[1], "m": ROWS[2]}).encode(), {}),
        ("t.csv", csv_bytes(), {"skip": 1}),
        ("t.csv", csv_bytes(), {"skip": 2, "header": ("id", "n")}),
        ("t.txt", b"a 1\nb 2\n\nc 3", {"kind": "lines", "pattern": r"(?P<id>\w) (?P<n>\d)", "number": "number"}),
        ("t.arrow", arrow_file(), {}),
    ],
)
def test_a_large_file_has_the_rows_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, form: dict[str, Any]
) -> None:
    for folder in ("small", "large"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    small = open_table(tmp_path / "small", name, ["id", "n"], TableFormat(**form))
    monkeypatch.setattr(json_table, "STREAM_ABOVE", 10)
    monkeypatch.setattr(streamed, "CHUNK", 7)
    large = open_table(tmp_path / "large", name, ["id", "n"], TableFormat(**form))
    assert len(small) == len(large) == 3
    assert small.digests == large.digests
    assert values(small, [2, 0, 1]) == values(large, [2, 0, 1])
    assert small.groups("id") == large.groups("id")


def test_lists_of_a_large_file_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "a", "n": [1, 2]}, {"id": "b", "n": []}, {"id": "c", "n": [3]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(json_table, "STREAM_ABOVE", 10)
    table = open_table(tmp_path, "t.jsonl", ["id", "n"], TableFormat(explode="n"))
    assert values(table, [2, 1, 0]) == [{"id": "c", "n": 3}, {"id": "a", "n": 2}, {"id": "a", "n": 1}]


@pytest.mark.parametrize("cut", [b'[{"id": "a", "n": 1}, {"id"', b'[{"id": "a", "n": 1}', b'{"id": "a", "n": 1}\n{"'])
def test_a_large_file_that_is_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bytes) -> None:
    (tmp_path / "t.jsonl").write_bytes(cut)
    monkeypatch.setattr(json_table, "STREAM_ABOVE", 10)
    with pytest.raises(SourceError, match="not a readable jsonl file"):
        open_table(tmp_path, "t.jsonl", ["id", "n"])


def test_files_of_an_operating_system_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name in ("t.json", "._t.json", "__MACOSX/t.json"):
        (tmp_path / name).write_text(ARRAY if name == "t.json" else "\0\5")
    assert len(open_table(tmp_path, "**/*.json", ["id"])) == 3
    with pytest.raises(MissingSourceError):
        open_table(tmp_path, "__MACOSX/*", ["id"])


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_row_group_is_read_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool, raw_rows: Callable[[int], pa.Table]
) -> None:
    """No batch holds more than the limit, rows come in any order, and ascending reads do not start again."""
    pq.write_table(raw_rows(200), tmp_path / "t.parquet", row_group_size=200, use_dictionary=dictionary)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 100_000)
    sizes, restarts = [], []
    whole, restart = parquet._RowGroup._batch_with, parquet._RowGroup._restart

    def batch_with(group: Any, row: int) -> Any:
        batch = whole(group, row)
        sizes.append(batch.nbytes)
        return batch

    def counted(group: Any) -> None:
        restarts.append(group)
        restart(group)

    monkeypatch.setattr(parquet._RowGroup, "_batch_with", batch_with)
    monkeypatch.setattr(parquet._RowGroup, "_restart", counted)
    table = open_table(tmp_path, "t.parquet", ["image", "number"])
    for numbers in (range(100), range(100, 200)):
        rows = [row for _, row in table.read(numbers, ["image", "number"])]
        assert [row["number"] for row in rows] == list(numbers)
        assert all(len(row["image"][0]["bytes"]) == 10_000 for row in rows)
    assert len(restarts) == 1
    assert [row["number"] for _, row in table.read([150, 3], ["image", "number"])] == [150, 3]
    assert max(sizes) <= 110_000 or dictionary
    assert table.row_bytes(["image"]) > 9_000 or dictionary


@pytest.fixture
def raw_rows() -> Callable[[int], pa.Table]:
    def make(count: int) -> pa.Table:
        images = [[{"bytes": bytes([number % 7]) * 10_000, "path": None}] for number in range(count)]
        kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        return pa.table({"image": pa.array(images, kind), "number": range(count)})

    return make


def test_groups_are_read_in_runs() -> None:
    runs = [[len(numbers) for numbers in run] for run in reading._runs([(0,), (1, 2), (3,), (4, 5, 6, 7), (8,)], 3)]
    assert runs == [[1, 2], [1], [4], [1]]
