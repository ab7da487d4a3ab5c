"""Rejects are counted by kind and cause; what a download has on record as failed is left out and no fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from build_cases import build, build_part, small_shards

from shards.build.claim import BuildError
from shards.build.rejects import kind_of, kinds, over_budget
from shards.download.urls import FetchFailure, media_path, write_failures
from shards.schema import MissingMediaError, RejectedError
from shards.sources.media_files import MediaFiles


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        (
            ["media: /data/a b/1.png does not exist", "media: /data/2.png does not exist"],
            "media: the file does not exist",
        ),
        (
            ["media: /a.jpg: not a readable image (OSError: image file is truncated (4 bytes not processed))"] * 2,
            "media: the file is truncated",
        ),
        (["media: /a.png: not a readable image (OSError: Truncated File Read)"] * 2, "media: the file is truncated"),
        (["media: /a.png: not a readable image (the file is empty)"] * 2, "media: the file is empty"),
        (
            ["media: /r/../a.png lies outside of /r (it leads to /a.png); to allow it, name its folder"] * 2,
            "media: the file lies outside of its folder; `media_roots` of the row allows it",
        ),
        (
            ["media: /a.jpg: not a readable image (UnidentifiedImageError: cannot)"] * 2,
            "media: the file is not an image",
        ),
        (["media: http 404: https://a.example/1", "media: http 404: http://b/x.jpg?y=2"], "media: http …: …"),
        (["filter: n is '3', wanted max 2", "filter: n is 'it\\'s', wanted max 2"], "filter: n is …, wanted max …"),
    ],
)
def test_reasons_of_one_kind(reasons: list[str], kind: str) -> None:
    assert {kind_of(reason) for reason in reasons[1:]} == {kind}
    assert kind_of(reasons[0]).startswith(kind.split("…")[0])


def test_a_row_counts_once() -> None:
    items = [reject("an empty question or answer", 4), reject("an empty question or answer", 4), reject("late", 4)]
    assert [(kind.reason, kind.number) for kind in kinds(items)] == [("an empty question or answer", 1), ("late", 1)]


def reject(reason: str, row: int = 0, omitted: bool = False) -> dict[str, Any]:
    return {"file": "a.jsonl", "row": row, "reason": reason, "omitted": omitted}


def test_kinds_have_an_example_and_causes_a_budget_each() -> None:
    media = [reject(f"media: /x/{number}.png does not exist", number) for number in range(3)]
    values = [reject("no answer", 7), reject("no answer", 8)]
    first, second = kinds([*values, *media])
    assert (first.reason, first.number) == ("media: the file does not exist", 3)
    assert first.example == "a.jsonl row 0: media: /x/0.png does not exist"
    assert (second.reason, second.number) == ("no answer", 2)
    assert over_budget([*media, *values], 3) is None
    assert over_budget([*media, *values], 2) == ("media", media)
    assert over_budget([*media[:1], *values], 1) == ("values", values)
    assert over_budget([{**item, "omitted": True} for item in media], 0) is None


def test_failed_downloads_are_left_out_and_no_fault(raw: Path, tmp_path: Path) -> None:
    """Half of the images are on record as failed: the rows are omitted, and built when the images have come."""
    mine, name = tmp_path / "raw", "demo-cap"
    shutil.copytree(raw, mine)
    file = next((mine / name / "data").glob("train-*.parquet"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    images = {}
    for number, row in enumerate(rows):
        url = f"https://a.example/{number}.jpg"
        images[url] = Path(row["image_url"].removeprefix("file://")).read_bytes()
        row["image_url"] = url
    pq.write_table(type(table).from_pylist(rows, table.schema), file)
    failures = []
    for number, (url, data) in enumerate(images.items()):
        if number % 2:
            failures.append(FetchFailure(url=url, dataset=name, row=number, reason="http 404", attempts=1))
        else:
            (mine / name / media_path(url)).parent.mkdir(parents=True, exist_ok=True)
            (mine / name / media_path(url)).write_bytes(data)
    write_failures(mine / name, failures)
    (mine / name / "manifest.json").write_text("{}")
    index = build(mine, tmp_path / "out", name)
    assert (index.totals.samples, index.totals.rejects) == (len(rows) - len(failures), len(failures))
    records = [json.loads(line) for line in (tmp_path / "out" / name / "rejects.jsonl").read_text().splitlines()]
    assert all(record["omitted"] for record in records)
    assert records[0]["reason"] == "media: not downloaded, http 404: https://a.example/1.jpg"
    url = failures[0].url
    (mine / name / media_path(url)).parent.mkdir(parents=True, exist_ok=True)
    (mine / name / media_path(url)).write_bytes(images[url])
    again = build_part(mine, tmp_path / "out", name)
    assert again.num_made == 1
    assert again.index is not None
    assert again.index.totals.rejects == len(failures) - 1


def test_a_limited_download_is_on_record(tmp_path: Path) -> None:
    url = "https://a.example/1.jpg"
    (tmp_path / "manifest.json").write_text(json.dumps({"media": {"limit": 5}}))
    with pytest.raises(MissingMediaError, match="limited to 5 images"):
        MediaFiles(root=tmp_path).image(url)
    (tmp_path / "manifest.json").write_text(json.dumps({"media": {"limit": None}}))
    with pytest.raises(RejectedError, match="not downloaded") as caught:
        MediaFiles(root=tmp_path).image(url)
    assert not isinstance(caught.value, MissingMediaError)


def test_a_stop_for_the_budget_keeps_whole_shards(raw: Path, tmp_path: Path) -> None:
    mine, name = tmp_path / "raw", "demo-video-track"
    shutil.copytree(raw, mine)
    videos = sorted((mine / name / "videos").iterdir())
    last = videos[-1].read_bytes()
    videos[-1].write_bytes(b"no video")
    pattern = r"(?s)allowed because of media:\n  1 x media: .*\n    data/train.* row 5: .*finished shards"
    with pytest.raises(BuildError, match=pattern):
        build(mine, tmp_path / "out", name, reject_budget=0.0, settings=small_shards())
    kept = {path: path.stat().st_ino for path in (tmp_path / "out" / name).glob("*.part.json")}
    assert len(kept) >= 2
    videos[-1].write_bytes(last)
    built = build_part(mine, tmp_path / "out", name, reject_budget=0.0, settings=small_shards())
    assert (built.num_made, built.num_kept) == (1, len(kept) - 1)
