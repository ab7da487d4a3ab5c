"""Small tables that ask for much memory: each is an error before it is read, and honest lists are read in turn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.sources import parquet
from shards.sources.parquet import SourceError, open_parquet

READ = """
import resource, sys
from pathlib import Path
from shards.sources.parquet import SourceError, open_parquet
file = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    table = open_parquet(file.parent, (file,), ["a"])
    table.groups(sys.argv[2] or None)
    table.read([0], ["a"])
except SourceError as error:
    print(error)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def lists_of_nulls(path: Path, counts: list[int]) -> Path:
    """One row for each count, with a list of as many nulls: they take no space in the file."""
    offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
    table = pa.table({"a": pa.ListArray.from_arrays(offsets, pa.nulls(sum(counts), pa.int8()))})
    pq.write_table(table, path, row_group_size=1 << 30)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("column", ["", "a"], ids=["read", "grouped"])
@pytest.mark.parametrize("counts", [[parquet.MAX_VALUES + 1], [1, 2, parquet.MAX_VALUES]], ids=["a row", "one of them"])
def test_a_small_file_of_many_values_is_not_read(tmp_path: Path, column: str, counts: list[int]) -> None:
    file = lists_of_nulls(tmp_path / "a.parquet", counts)
    assert file.stat().st_size < 700
    command = [sys.executable, "-c", READ, str(file), column]
    error, taken = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert f"has {sum(counts)} values in {len(counts)} rows, at most {parquet.MAX_VALUES} are read" in error
    assert int(taken) < 100 << 20  # bytes


def test_a_small_file_of_many_rows_is_not_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.nulls(parquet.MAX_ROWS + 1, pa.int8())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=f"{parquet.MAX_ROWS + 1} rows, at most {parquet.MAX_ROWS} are read"):
        open_parquet(tmp_path, (tmp_path / "a.parquet",), ["a"])


def test_lists_that_take_no_space_in_the_file_count_for_the_batch(tmp_path: Path) -> None:
    """A thousand masks of zeros were one batch, because the file holds them in a few bytes."""
    file = lists_of_nulls(tmp_path / "a.parquet", [300_000] * 100)
    table = open_parquet(tmp_path, (file,), ["a"])
    assert table.row_bytes(["a"]) == 300_000 * parquet.VALUE_BYTES
    (_, row), (_, other) = table.read([3, 99], ["a"])
    assert len(row["a"]) == len(other["a"]) == 300_000
    assert parquet._row_group.cache_info().currsize == 1
