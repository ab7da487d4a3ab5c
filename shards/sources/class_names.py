"""The names of classes that the Hugging Face library writes into the schema of a table."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.sources.content import binary_kind


def class_names(path: Path) -> dict[str, list[str]]:
    """The names of classes that the Hugging Face library writes into a parquet or Arrow file, by column."""
    kind = binary_kind(path)
    if kind is None:
        return {}
    try:
        schema = pq.read_schema(path) if kind == "parquet" else pa.ipc.open_stream(pa.memory_map(str(path))).schema
    except pa.ArrowInvalid:  # an Arrow file and no stream
        schema = pa.ipc.open_file(pa.memory_map(str(path))).schema
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
