"""Bad items of published data: the rows that `skip` leaves out, what is recorded, and the items that no row has."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from catalog_cases import catalog, processor, write_raw

from shards.build.builder import build_dataset
from shards.catalog import Row, Skip
from shards.convert.common import Omitted
from shards.convert.reading import convert, open_rows, read_groups
from shards.convert.skips import skip_reason, skipped_items, unmatched_skips
from shards.sources.parquet import MissingSourceError
from tools.build_shards import write_report_json


def row_of(*skips: dict[str, Any]) -> Row:
    columns = {"video": "v", "span": "s", "question": "q", "answer": "a"}
    return Row.model_validate(
        {
            **{"name": "mine", "stages": ["sft"], "files": {"train": "t.jsonl"}, "converter": "video_qa"},
            **{"columns": columns, "options": {"open_style": "user_qa"}, "skip": list(skips)},
        }
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"v": "b", "s": [0, 1]}, "skipped: v is 'b', s is (0.0, 1.0); source: me"),
        ({"v": "b", "s": [0.0004, 1.0001]}, "skipped: v is 'b', s is (0.0, 1.0); source: me"),
        ({"v": "b", "s": [0, 2]}, ""),
        ({"v": "c", "s": [0, 1]}, ""),
        ({"v": "b", "s": None}, ""),
        ({"s": [0, 1]}, ""),
    ],
)
def test_all_columns_of_an_item_must_match(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    row = row_of({"columns": ["v", "s"], "rows": [["a", [0, 1]], ["b", [0, 1]]], "source": "me"})
    assert skip_reason(row, tmp_path, values) == reason


def test_a_published_table_lists_more_items(tmp_path: Path) -> None:
    spans = pa.array(
        [{"from": 1.3, "to": 2.7}, {"from": 4.0, "to": 5.0}], pa.struct([("from", pa.float32()), ("to", pa.float32())])
    )
    pq.write_table(pa.table({"id": ["a", "b"], "at": spans}), tmp_path / "bad.parquet")
    listed = {
        "columns": ["v", "s"],
        "files": "bad.parquet",
        "values": ["id", ["at.from", "at.to"]],
        "source": "the list",
    }
    row = row_of({"columns": ["v"], "rows": ["x"], "source": "me"}, listed)
    assert skip_reason(row, tmp_path, {"v": "a", "s": [1.3, 2.7]}).endswith("source: the list")
    assert skip_reason(row, tmp_path, {"v": "x", "s": [0, 9]}) == "skipped: v is 'x'; source: me"
    assert skip_reason(row, tmp_path, {"v": "a", "s": [4, 5]}) == ""
    reasons = [skip_reason(row, tmp_path, {"v": "a", "s": [1.3, 2.7]}), "another reason"]
    assert unmatched_skips(row, tmp_path, reasons) == [
        "skipped: v is 'x'; source: me",
        "skipped: v is 'b', s is (4.0, 5.0); source: the list",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/t.jsonl").write_text('{"v": "a", "s": [0, 1]}')
    with pytest.raises(MissingSourceError, match=r"mine: .*bad.parquet: no such file"):
        open_rows(row.model_copy(update={"columns": {}}), "sft", tmp_path / "other")


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"columns": ["v"], "source": "me"}, "skip on v: give the items in `rows` or `files`"),
        ({"columns": ["v"], "files": "t.csv", "source": "me"}, "`files` and `values` belong together"),
        ({"columns": ["v", "s"], "rows": ["a"], "source": "me"}, "does not have one value for each of v, s"),
        ({"columns": ["v", "s"], "files": "t", "values": ["a"], "source": "me"}, "one value for each of v, s"),
        ({"columns": ["v"], "rows": ["a"]}, "source"),
        ({"columns": [], "rows": ["a"], "source": "me"}, "columns"),
    ],
)
def test_an_entry_that_cannot_match_is_refused(skip: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        Skip.model_validate(skip)


OFFICIAL = {
    "youcook2-label": {("UB1_MNpdvgs", (595.0, 613.0)), ("UB1_MNpdvgs", (624.0, 635.0))},
    "youcook2-spans": {("UB1_MNpdvgs", (595.0, 613.0)), ("UB1_MNpdvgs", (624.0, 635.0))},
    "coin": {("0WeJVDJvVk8", (0.4, 1.1)), ("gone", (0.0, 1.0))},  # the fixture's table
    "how2qa": {("Z1NEMNKgR9U",)},
    "molmo2-cap": {(i,) for i in "0OfUqrbRa2Y mTXBQzptWAg NyuA4FatDQk a_ gsfIHiBB6xE bXApJtAf6Qo N8BlpYSpgg4".split()},
    "news-video-qa": {(i,) for i in "389x18 76x16 254x17 254x21 389x15 254x20 389x17".split()},
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_what_the_official_loader_skips_is_left_out_and_no_reject(name: str, tmp_path: Path) -> None:
    (row,) = catalog().select("sft", [name])
    write_raw(tmp_path, row)
    raw = tmp_path / row.folder
    assert set().union(*(skipped_items(skip, raw) for skip in row.skip)) == OFFICIAL[name]
    table = open_rows(row, "sft", raw)
    groups = read_groups(row, "sft", raw, table, table.groups(row.group_by))
    left_out = [item for group in groups for item in convert(group) if isinstance(item, Omitted)]
    skipped = [item for item in left_out if item.reason.startswith("skipped: ")]
    assert skipped and not any(item.fault for item in skipped)


def test_items_without_a_row_are_shown_after_a_whole_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = catalog().select("sft", ["coin"])
    write_raw(tmp_path, row)
    out, make = tmp_path / "out", functools.partial(processor, "sft")
    settings = catalog().stages["sft"].model_copy(update={"num_variants": 2, "examples_per_shard": 2})
    part = build_dataset(row, "sft", settings, make, raw=tmp_path / "coin", out=out, task_of=(0, 2))
    assert part.unmatched_skips == ()
    built = build_dataset(row, "sft", settings, make, raw=tmp_path / "coin", out=out)
    assert len(built.unmatched_skips) == 1
    write_report_json("sft/coin", built, (0, 1), str(out), 1.0)
    assert (
        "1 items of `skip` match no row; first: id is 'gone', annotation.segment is (0.0, 1.0)"
        in capsys.readouterr().out
    )
    report = json.loads((out / "report.json").read_text())
    assert report["unmatched_skips"] == list(built.unmatched_skips)
    assert any("skipped: id is" in reason for reason in report["left_out"])
