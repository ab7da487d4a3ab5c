"""Rows that carry what other tables say of them, and lists in parquet files that become rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.catalog import Lookup, TableFormat
from shards.sources.joined import open_joined
from shards.sources.parquet import SourceError
from shards.sources.tables import Table, open_table

ROWS = [{"id": "a", "of": ["x", "y"]}, {"id": "b", "of": []}, {"id": "c", "of": ["z", "x"]}]


def joined(folder: Path, other: object, **lookup: str) -> Table:
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "other.json").write_text(json.dumps(other))
    form = TableFormat(key="key") if isinstance(other, dict) else TableFormat()
    found = (Lookup(name="more", files="other.json", table=form, **lookup),)
    return open_joined(open_table(folder, "rows.json", ["id", "of"]), folder, found, ["id", "of", "more.value"])


def values(table: Table, rows: list[int]) -> list[object]:
    return [row["more"] for _, row in table.read(rows, ["id", "of", "more.value"])]


def test_a_value_finds_its_row_and_a_list_one_for_each_item(tmp_path: Path) -> None:
    by_id = joined(tmp_path / "1", {"c": 3, "a": 1}, key="key", column="id")
    assert values(by_id, [2, 1, 0]) == [{"value": 3}, None, {"value": 1}]
    by_item = joined(tmp_path / "2", {"x": 1, "y": 2}, key="key", column="of")
    assert values(by_item, [0, 1, 2]) == [[{"value": 1}, {"value": 2}], [], [None, {"value": 1}]]


def test_without_a_key_rows_belong_together_by_their_place(tmp_path: Path) -> None:
    table = joined(tmp_path / "3", [{"value": 1}, {"value": 2}, {"value": 3}])
    assert values(table, [2, 0]) == [{"value": 3}, {"value": 1}]
    with pytest.raises(SourceError, match="has 2 rows for 3"):
        joined(tmp_path / "4", [{"value": 1}, {"value": 2}])
    with pytest.raises(ValueError, match="belong together"):
        Lookup(name="more", files="other.json", key="id")


def test_lists_in_parquet_become_rows(tmp_path: Path) -> None:
    rows = [{"image": "1", "qas": [{"q": "a"}, {"q": "b"}]}, {"image": "2", "qas": []}, {"image": "3", "qas": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    table = open_table(tmp_path, "t.parquet", ["image", "qas.q"], TableFormat(explode="qas"))
    assert [row for _, row in table.read([1, 0], ["image", "qas.q"])] == [
        {"image": "1", "qas": {"q": "b"}},
        {"image": "1", "qas": {"q": "a"}},
    ]
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(SourceError, match="not a readable parquet file"):
        open_table(tmp_path, "cut.parquet", ["image"], TableFormat(explode="qas"))
