"""Builds: equal bytes whatever the workers, continued after a kill, refusals that say what to do."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from build_cases import build, build_part, catalog, factory, tree
from fork_server import python

from shards.build.builder import build_dataset
from shards.build.claim import BuildError
from shards.build.rebuild import rows_to_build
from shards.catalog import Filter, Stage
from shards.format import TOKEN_DTYPE
from shards.sources.parquet import SourceError
from shards.sources.tables import open_table


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_one_and_three_workers_give_equal_bytes(raw: Path, tmp_path: Path) -> None:
    index = build(raw, tmp_path / "one", "demo-points")
    build(raw, tmp_path / "three", "demo-points", workers=3)
    assert len(index.shards) >= 3
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretraining", "sft", "long", "eval"])
def test_every_dataset_of_every_stage_builds(raw: Path, tmp_path: Path, stage: Stage) -> None:
    for row in catalog(stage).select(stage):
        index = build(raw, tmp_path, row.name, stage)
        assert index.totals.samples > 0
        assert index.totals.tokens > index.totals.samples


@pytest.mark.slow
def test_killed_builds_continue_to_equal_bytes(raw: Path, tmp_path: Path) -> None:
    """kill -9 after the first shard; the second run keeps that shard's file and ends with the same bytes."""
    build(raw, tmp_path / "whole", "demo-cap")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from build_cases import build\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), 'demo-cap')"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(raw), str(out), str(Path(__file__).parents[1])]
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


@pytest.mark.slow
def test_workers_end_with_a_killed_build(raw: Path, tmp_path: Path) -> None:
    """A pool's workers outlive a main process that is killed; ours must not go on writing."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "if __name__ == '__main__':\n"
        "    from build_cases import build\n"
        "    build(Path(sys.argv[1]), Path(sys.argv[2]), 'demo-video-qa', workers=2)"
    )
    (tmp_path / "main.py").write_text(script)
    command = [
        sys.executable,
        str(tmp_path / "main.py"),
        str(raw),
        str(tmp_path / "out"),
        str(Path(__file__).parents[1]),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "out" / "demo-video-qa", time.monotonic() + 120
    while not list(folder.glob(".*.tar.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    build(raw, tmp_path / "out", "demo-video-qa")
    build(raw, tmp_path / "whole", "demo-video-qa")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files to the collector
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
    with pytest.raises(BuildError, match=r"other settings: settings.num_variants was 4, is 2; .*--overwrite"):
        build(raw, tmp_path, "demo-chat", settings=changed)
    assert build(raw, tmp_path, "demo-chat", settings=changed, overwrite=True).num_variants == 2


@pytest.mark.slow
def test_rejects_are_recorded_and_bounded(raw: Path, tmp_path: Path) -> None:
    """A missing video is one reject; above the budget the build stops, and continues when the source is mended."""
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    videos = sorted((broken / "demo-video-track" / "videos").iterdir())
    data = videos[0].read_bytes()
    videos[0].unlink()
    with pytest.raises(BuildError, match=r"1 rejects in \d+ groups of rows, 5.0% allowed"):
        build(broken, tmp_path, "demo-video-track")
    folder = tmp_path / "demo-video-track"
    (reject,) = rejects(folder)
    assert reject["file"] == "data/train-00000-of-00001.parquet"
    assert reject["row"] == 0
    assert "does not exist" in reject["reason"]
    assert not (folder / "index.json").exists()
    index = build(broken, tmp_path, "demo-video-track", reject_budget=0.5)
    assert (index.totals.rejects, index.totals.samples) == (1, len(videos) - 1)
    (folder / "000000.part.json").unlink()
    videos[0].write_bytes(data)
    assert build(broken, tmp_path, "demo-video-track").totals.samples == len(videos)
    assert (folder / "rejects.jsonl").read_bytes() == b""


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


def test_a_row_that_the_converter_cannot_take_is_one_reject(raw: Path, tmp_path: Path) -> None:
    mine = tmp_path / "raw"
    shutil.copytree(raw, mine)
    file = mine / "demo-video-track" / "data" / "train-00000-of-00001.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[2]["width"] = None
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(file)), file)
    index = build(mine, tmp_path, "demo-video-track", reject_budget=0.5)
    assert index.totals.samples == len(rows) - 1
    (reject,) = rejects(tmp_path / "demo-video-track")
    assert (reject["row"], reject["key"], reject["omitted"]) == (2, "demo-video-track-00000002", False)
    assert reject["reason"].startswith("video_track failed on the row's values: TypeError: float()")


@pytest.mark.slow
def test_a_reject_does_not_cost_its_siblings(raw: Path, tmp_path: Path) -> None:
    """A row of demo-count is two examples; where the processor refuses one, the other is still made."""
    whole = build(raw, tmp_path / "whole", "demo-count").totals
    settings = catalog("sft").stages["sft"]
    tight = settings.model_copy(update={"limits": dataclasses.replace(settings.limits, sequence_length=100)})
    made = build(raw, tmp_path / "tight", "demo-count", settings=tight, reject_budget=2.0).totals
    lost = {reject["key"] for reject in rejects(tmp_path / "tight" / "demo-count")}
    assert len(lost) + made.samples == whole.samples
    assert made.rejects == len(lost)
    partners = {key.replace("point_count", "pointing") for key in lost if "point_count" in key}
    assert 0 < len(partners - lost)


def test_a_dataset_without_samples_is_an_error(raw: Path, tmp_path: Path) -> None:
    filters = (Filter(column="first_message_qwen3_tokens", op="max", value=-1),)
    with pytest.raises(BuildError, match=r"no sample was made; .*rejects\.jsonl says why"):
        build(raw, tmp_path, "demo-chat", row={"filters": filters})
    assert all(reject["omitted"] for reject in rejects(tmp_path / "demo-chat"))
    with pytest.raises(BuildError, match=r"no converter 'poem'; known: chat, diagram_choice"):
        build(raw, tmp_path, "demo-chat", row={"converter": "poem"})


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_a_build_that_cannot_stay_in_budget_stops_early(raw: Path, tmp_path: Path) -> None:
    """The URLs of a copied folder lead out of it, so every row is wrong: the build ends before its last shard."""
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    with pytest.raises(BuildError, match=r"rejects in 90 groups of rows(.|\n)*lies outside"):
        build(broken, tmp_path, "demo-cap", workers=2)
    tars = list((tmp_path / "demo-cap").glob("*.tar"))
    assert 0 < len(tars) < 12


def test_two_builds_do_not_share_a_folder(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-chat").mkdir()
    with open(tmp_path / "demo-chat" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another build is at work there"):
            build(raw, tmp_path, "demo-chat")
    assert build(raw, tmp_path, "demo-chat").totals.samples > 0


def test_changed_or_damaged_files_are_noticed(raw: Path, tmp_path: Path) -> None:
    """A cut shard is built again, a strange file is left alone, other raw rows give the shards of a fresh build."""
    mine = tmp_path / "raw"
    shutil.copytree(raw, mine)
    out = tmp_path / "out" / "demo-chat"
    build(mine, tmp_path / "out", "demo-chat")
    before = tree(out)
    (out / "000001.tar").write_bytes(before["000001.tar"][:-512])
    (out / "000002.part.json").write_text("{")
    build(mine, tmp_path / "out", "demo-chat")
    assert tree(out) == before
    file = mine / "demo-chat" / "data" / "train-00000-of-00001.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.take(list(range(len(rows)))[::-1]), file)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match=r"files.data/train-00000-of-00001.parquet was .* once without --task"):
        build_part(mine, tmp_path / "out", "demo-chat", task_of=(0, 2))
    assert tree(out) == before | {"notes.txt": b"mine"}
    build(mine, tmp_path / "out", "demo-chat")
    build(mine, tmp_path / "fresh", "demo-chat")
    assert tree(out) == tree(tmp_path / "fresh" / "demo-chat") | {"notes.txt": b"mine"} != before


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
        patch.setattr("shards.atomic.os.replace", full)
        with pytest.raises(BuildError, match=r"the disk is full; make room; the same command continues"):
            build(raw, tmp_path, "demo-chat")  # the mark of the build itself cannot be written
    assert [path.name for path in (tmp_path / "demo-chat").iterdir()] == [".lock"]
    assert build(raw, tmp_path, "demo-chat").totals.samples > 0


@pytest.mark.slow
def test_a_disk_that_fills_inside_a_shard_keeps_the_shards_before(raw: Path, tmp_path: Path) -> None:
    """A real limit: no file may grow beyond 40 kB, so a tar with images fails inside its write."""
    build(raw, tmp_path / "whole", "demo-cap")
    script = (
        "import resource, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from build_cases import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), 'demo-cap')"
    )
    command = [sys.executable, "-c", script, str(raw), str(tmp_path / "out"), str(Path(__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "BuildError: sft/demo-cap: [Errno 27] File too large; the same command continues" in run.stderr
    folder = tmp_path / "out" / "demo-cap"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "build.json"]
    build(raw, tmp_path / "out", "demo-cap")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_groups_keep_the_order_of_first_appearance(raw: Path) -> None:
    table = open_table(raw / "demo-points", "data/train-*.parquet", ["image_url"])
    groups = table.groups("image_url")
    assert [numbers[0] for numbers in groups] == sorted(numbers[0] for numbers in groups)
    assert sorted(number for numbers in groups for number in numbers) == list(range(len(table)))


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    for number in range(2):
        values = list(range(number * 10, number * 10 + 10))
        pq.write_table(pa.table({"x": values}), tmp_path / f"{number}.parquet", row_group_size=3)
    table = open_table(tmp_path, "*.parquet", ["x"])
    wanted = [17, 2, 9, 10, 2]
    found = table.read(wanted, ["x"])
    assert [values["x"] for _, values in found] == wanted
    assert [(source.file, source.row) for source, _ in found][:2] == [("1.parquet", 7), ("0.parquet", 2)]


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong(raw: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parents[3] / "tools" / "build_shards.py"
    command = [python(), str(tool), "--stage", "sft", "--catalog", "demo", "--datasets", "demo-cup"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MOLMO2_DATA": str(tmp_path)})
    assert run.returncode == 1
    assert "not in stage sft: demo-cup; known: demo-cap" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_a_tree_that_does_not_fit_becomes_several_samples(raw: Path, tmp_path: Path) -> None:
    """Nothing is dropped: every annotation is in one of the parts, and their records say what was done."""
    settings = catalog("sft").stages["sft"]
    tight = settings.model_copy(update={"limits": dataclasses.replace(settings.limits, sequence_length=160)})
    wide = build(raw, tmp_path / "wide", "demo-video-qa", "sft")
    built = build_part(raw, tmp_path / "tight", "demo-video-qa", "sft", settings=tight)
    assert (index := built.index) is not None
    assert index.totals.annotations == wide.totals.annotations
    assert index.totals.rejects == wide.totals.rejects
    assert index.totals.samples > wide.totals.samples
    parts: dict[str, int] = {}
    shrunk = 0
    for path in sorted((tmp_path / "tight").rglob("*.tar")):
        with tarfile.open(path) as tar:
            records = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
        for record in records:
            notes = [note["annotations"] for note in record.get("fitted", []) if "annotations" in note]
            shrunk += any("crops" in note for note in record.get("fitted", []))
            parts[record["key"]] = notes[0]["kept"] if notes else 0
            assert not notes or notes[0]["kept"] == max(m["branch"] for m in record["variants"][0]["messages"])
    halves = [key for key in parts if key.endswith(("-a", "-b"))]
    assert halves and all(parts[key] for key in halves)
    assert +Counter(built.index.fitted) == {"shrunk": shrunk, "parts": len(halves)} and shrunk > 0
    assert not any(parts[key] for key in parts.keys() - set(halves))


def test_a_stage_builds_again_what_a_narrower_one_lost_much_of(raw: Path, tmp_path: Path) -> None:
    demo = catalog("sft")
    long = demo.stages["long"].model_copy(update={"rebuilds": "sft"})
    images = tuple(row.model_copy(update={"stages": ("sft",)}) for row in demo.rows if row.name == "demo-count")
    videos = tuple(row for row in demo.rows if row.name == "demo-video-qa")
    both = demo.model_copy(update={"rows": images + videos, "stages": {**demo.stages, "long": long}})

    def names(asked: list[str] | None = None) -> list[str]:
        return [row.name for row, _ in rows_to_build(both, "long", asked, str(tmp_path))]

    assert names() == ["demo-video-qa"], "what is not built has lost nothing"
    build(raw, tmp_path / "sft", "demo-count", "sft")
    assert names() == ["demo-video-qa"]
    settings = demo.stages["sft"]
    tight = settings.model_copy(update={"limits": dataclasses.replace(settings.limits, max_crops=2)})
    shutil.rmtree(tmp_path / "sft")
    lost = build(raw, tmp_path / "sft", "demo-count", "sft", settings=tight)
    assert lost.fitted["shrunk"] > 0.01 * lost.totals.samples
    assert names() == ["demo-video-qa", "demo-count"]
    assert names(["demo-count"]) == ["demo-count"] and names(["demo-video-qa"]) == ["demo-video-qa"]
    ((row, share),) = rows_to_build(both, "long", ["demo-count"], str(tmp_path))
    assert share == lost.fitted["shrunk"] / lost.totals.samples
    assert row.stages == ("sft", "long")
    whole = build_dataset(row, "long", long, factory(raw, "long"), raw=raw / "demo-count", out=tmp_path / "long")
    assert whole.index is not None and whole.index.stage == "long" and whole.index.fitted["shrunk"] == 0
