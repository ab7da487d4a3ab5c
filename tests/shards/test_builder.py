"""Builds: equal bytes whatever the workers, continued after a kill, refusals that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from build_cases import build, catalog, tree

from shards.builder import BuildError, group_rows
from shards.format import TOKEN_DTYPE
from shards.sources.parquet import SourceError, open_table


def test_one_and_three_workers_give_equal_bytes(raw: Path, tmp_path: Path) -> None:
    index = build(raw, tmp_path / "one", "demo-points")
    build(raw, tmp_path / "three", "demo-points", workers=3)
    assert len(index.shards) >= 3
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.parametrize("stage", ["pretraining", "sft", "long", "eval"])
def test_every_dataset_of_every_stage_builds(raw: Path, tmp_path: Path, stage: str) -> None:
    for row in catalog(stage).select(stage):  # type: ignore[arg-type]
        index = build(raw, tmp_path, row.name, stage)  # type: ignore[arg-type]
        assert index.totals.samples > 0
        assert index.totals.tokens > index.totals.samples


def test_killed_builds_continue_to_equal_bytes(raw: Path, tmp_path: Path) -> None:
    """kill -9 after the first shard; the second run keeps that shard's file and ends with the same bytes."""
    build(raw, tmp_path / "whole", "demo-cap")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from build_cases import build\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), 'demo-cap')"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(raw), str(out), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "demo-cap" / "000000.part.json").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "demo-cap" / "index.json").exists()
    first = (out / "demo-cap" / "000000.tar").stat().st_ino
    build(raw, out, "demo-cap")
    assert (out / "demo-cap" / "000000.tar").stat().st_ino == first
    assert tree(out) == tree(tmp_path / "whole")


def test_plain_webdataset_reads_what_was_stored(raw: Path, tmp_path: Path) -> None:
    index = build(raw, tmp_path, "demo-count")
    names = [str(tmp_path / "demo-count" / f"{shard.name}.tar") for shard in index.shards]
    samples = list(wds.WebDataset(names, shardshuffle=False).decode("rgb8"))
    assert len(samples) == index.totals.samples
    tokens = 0
    for sample in samples:
        assert sample["json"]["key"] == sample["__key__"]
        assert sample["tokens0.npy"].dtype == TOKEN_DTYPE
        assert sample["000.jpg"].dtype == np.uint8
        tokens += len(sample["tokens0.npy"])
    assert 0 < tokens < index.totals.tokens  # placeholders stand unexpanded


def test_other_settings_are_refused_by_name(raw: Path, tmp_path: Path) -> None:
    build(raw, tmp_path, "demo-chat")
    settings = catalog("sft").stages["sft"]
    changed = settings.model_copy(update={"num_variants": 2})
    with pytest.raises(BuildError, match=r"other settings \(settings differ\).*--overwrite"):
        build(raw, tmp_path, "demo-chat", settings=changed)
    assert build(raw, tmp_path, "demo-chat", settings=changed, overwrite=True).num_variants == 2


def test_rejects_are_recorded_and_bounded(raw: Path, tmp_path: Path) -> None:
    """A missing video is one reject; above the budget the build stops, and continues when the source is mended."""
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    videos = sorted((broken / "demo-video-track" / "videos").iterdir())
    data = videos[0].read_bytes()
    videos[0].unlink()
    with pytest.raises(BuildError, match=r"1 of \d+ examples rejected, 5.0% are allowed"):
        build(broken, tmp_path, "demo-video-track")
    folder = tmp_path / "demo-video-track"
    (reject,) = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert reject["file"] == "data/train-00000-of-00001.parquet"
    assert reject["row"] == 0
    assert "does not exist" in reject["reason"]
    assert not (folder / "index.json").exists()
    index = build(broken, tmp_path, "demo-video-track", reject_budget=0.5)
    assert index.totals.rejects == 1
    videos[0].write_bytes(data)


def test_unreadable_videos_are_rejected_with_their_name(raw: Path, tmp_path: Path) -> None:
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    first = sorted((broken / "demo-video-track" / "videos").iterdir())[0]
    first.write_bytes(first.read_bytes()[:500])
    with pytest.raises(BuildError, match=first.name):
        build(broken, tmp_path, "demo-video-track")


def test_missing_sources_and_wrong_columns_are_named(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere.*no such file"):
        build(raw, tmp_path, "demo-cap", row={"files": {"train": "nowhere/*.parquet"}})
    columns = {"image": "picture", "caption": "caption", "transcripts": "transcripts"}
    with pytest.raises(SourceError, match=r"no column picture; it has image_url, caption, transcripts"):
        build(raw, tmp_path, "demo-cap", row={"columns": columns})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SourceError, match="not a readable parquet file"):
        open_table(tmp_path / "bad", "*.parquet", ["x"])


def test_a_full_disk_ends_in_one_message(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shards.storage.os.replace", full)
        with pytest.raises(OSError, match="No space"):
            build(raw, tmp_path, "demo-chat")  # the mark of the build itself cannot be written
    build_marker = tmp_path / "demo-chat"
    build(raw, tmp_path, "demo-cap")
    shutil.rmtree(tmp_path / "demo-cap")
    with monkeypatch.context() as patch:
        patch.setattr("shards.builder.write_shard", full)
        with pytest.raises(BuildError, match=r"disk is full; make room and start again"):
            build(raw, tmp_path, "demo-cap")
    assert not (tmp_path / "demo-cap" / "index.json").exists()
    assert not list((tmp_path / "demo-cap").glob("*.tmp"))
    assert not (build_marker / "index.json").exists()
    assert build(raw, tmp_path, "demo-cap").totals.samples > 0


def test_groups_keep_the_order_of_first_appearance(raw: Path) -> None:
    table = open_table(raw / "demo-points", "data/train-*.parquet", ["image_url"])
    groups = group_rows(table, "image_url")
    assert [numbers[0] for numbers in groups] == sorted(numbers[0] for numbers in groups)
    assert sorted(number for numbers in groups for number in numbers) == list(range(len(table)))


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    import pyarrow as pa

    for number in range(2):
        values = list(range(number * 10, number * 10 + 10))
        pq.write_table(pa.table({"x": values}), tmp_path / f"{number}.parquet", row_group_size=3)
    table = open_table(tmp_path, "*.parquet", ["x"])
    wanted = [17, 2, 9, 10, 2]
    found = table.read(wanted, ["x"])
    assert [values["x"] for _, values in found] == wanted
    assert [(source.file, source.row) for source, _ in found][:2] == [("1.parquet", 7), ("0.parquet", 2)]


def test_the_command_line_says_what_is_wrong(raw: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "build_shards.py"
    command = [sys.executable, str(tool), "--stage", "sft", "--catalog", "demo", "--datasets", "demo-cup"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MOLMO2_DATA": str(tmp_path)})
    assert run.returncode == 1
    assert "not in stage sft: demo-cup; known: demo-cap" in run.stderr
    assert "Traceback" not in run.stderr
