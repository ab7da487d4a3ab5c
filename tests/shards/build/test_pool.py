"""Killed workers: the shard is tried again alone, and neither it nor a broken table ends the other datasets."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from build_cases import KillingProcessor, build, catalog, factory, tree
from fork_server import python

from shards.build.builder import build_dataset
from shards.build.claim import BuildError
from shards.build.pool import worker_pool
from shards.convert.reading import open_rows

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("kills", [1, 2])
def test_a_killed_worker_costs_no_other_shard(raw: Path, tmp_path: Path, kills: int) -> None:
    """Killed once, the shard is built alone; killed twice, it is recorded as failed. The next dataset is built."""
    marks = tmp_path / "marks"
    marks.mkdir()
    for number in range(kills):
        (marks / str(number)).touch()
    rows = catalog("sft")
    (points,) = rows.select("sft", ["demo-points"])
    victim = open_rows(points, "sft", raw / "demo-points").groups(points.group_by)[8][0]  # the first of shard 000001
    make = functools.partial(KillingProcessor, factory(raw, "sft"), f"demo-points-{victim:08d}", marks)
    settings = rows.stages["sft"]
    with worker_pool(make, 2) as pool:
        for name in ("demo-points", "demo-chat"):
            (row,) = rows.select("sft", [name])
            out = tmp_path / "out" / name
            if kills == 2 and name == "demo-points":
                with pytest.raises(BuildError, match=r"1 shards failed.*\n.*000001: .*killed twice.*GB of memory"):
                    build_dataset(row, "sft", settings, make, raw=raw / name, out=out, pool=pool)
                failure = json.loads((out / "000001.failed.json").read_text())
                assert "GB of memory" in failure["reason"]
                assert (out / "000000.part.json").exists()
                assert (out / "000002.part.json").exists()
                build_dataset(row, "sft", settings, make, raw=raw / name, out=out, pool=pool, retry_failed=True)
            else:
                build_dataset(row, "sft", settings, make, raw=raw / name, out=out, pool=pool)
            build(raw, tmp_path / "whole", name)
            assert tree(out) == tree(tmp_path / "whole" / name)


@pytest.mark.slow
def test_a_broken_table_ends_no_other_dataset(raw: Path, tmp_path: Path) -> None:
    """A file that is a folder raises an OSError, and columns of several types an Arrow error."""
    mine = tmp_path / "raw"
    mine.mkdir()
    for name in ("tokenizer", "demo-chat"):
        (mine / name).symlink_to(raw / name)
    for name in ("demo-points", "demo-count"):
        shutil.copytree(raw / name / "data", mine / name / "data")
    file = mine / "demo-points/data/train-00000-of-00001.parquet"
    file.unlink()
    file.mkdir()
    file = mine / "demo-count/data/train-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(0).column(0).data_page_offset
    data[start : start + 400] = bytes(400)
    file.write_bytes(data)
    command = [python(), ROOT / "tools/build_shards.py", "--stage", "sft", "--catalog", "demo", "--workers", "1"]
    names = ["--datasets", "demo-points", "demo-count", "demo-chat"]
    run = subprocess.run(
        [*command, "--raw", mine, "--out", tmp_path / "out", *names], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "not built, 2 of 3: demo-count, demo-points" in run.stderr
    assert (tmp_path / "out/sft/demo-chat/index.json").exists()
