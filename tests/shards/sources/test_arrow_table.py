"""Arrow streams as tables: rows of several batches, and files that are cut short."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from shards.sources.parquet import SourceError
from shards.sources.tables import open_table


def stream() -> bytes:
    """Two rows, each in a batch of its own."""
    table = pa.table({"id": ["a", "b"], "said": [["x", "y"], []]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def test_rows_of_all_batches(tmp_path: Path) -> None:
    (tmp_path / "data-0.arrow").write_bytes(stream())
    table = open_table(tmp_path, "data-*.arrow", ["id", "said"])
    assert [values for _, values in table.read([1, 0], ["id", "said"])] == [
        {"id": "b", "said": []},
        {"id": "a", "said": ["x", "y"]},
    ]


def test_a_file_cut_anywhere_is_no_table(tmp_path: Path) -> None:
    whole, readable = stream(), []
    for length in range(len(whole)):
        path = tmp_path / f"cut-{length}.arrow"
        path.write_bytes(whole[:length])
        try:
            open_table(tmp_path, path.name, ["id"])
        except SourceError as error:
            assert "not a readable arrow file" in str(error)
        else:
            readable.append(length)
    assert not readable


def test_what_is_no_stream_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.arrow").write_bytes(b"no stream" + stream()[-8:])
    with pytest.raises(SourceError, match="not a readable arrow file"):
        open_table(tmp_path, "t.arrow", ["id"])
