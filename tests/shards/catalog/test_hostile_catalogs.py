"""Paths of a catalog and of its rows: none leads out of the raw folder, or to the downloader's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest

from shards.catalog import (
    Catalog,
    CatalogError,
    Download,
    Exclusion,
    Folder,
    Lookup,
    Masks,
    Row,
    Skip,
    load_catalog,
)
from shards.schema import RejectedError
from shards.sources.media_files import MediaFiles

OUTSIDE = ["../x", "a/../../x", "/etc/x", "..\\x", "", "a\0b", ".."]
OWN = [
    ".download/listing.json",
    ".Download",
    "manifest.json",
    "failures.jsonl",
    "./.download/x",
    ".cache/huggingface/x",
]
ROW: dict[str, Any] = {
    "name": "x",
    "stages": ["sft"],
    "files": {"train": "*.json"},
    "converter": "caption",
    "columns": {},
}


@pytest.mark.parametrize("path", OUTSIDE + OWN)
def test_a_download_writes_and_deletes_below_its_folder_alone(path: str) -> None:
    base = {"kind": "archives", "urls": {"a.zip": "http://x/a.zip"}}
    for field in (
        {"urls": {path: "http://x/y"}},
        {"sha256": {path: "0" * 64}},
        {"extract": {"a.zip": path}},
        *([{"extract": {path: "."}}] if path in OUTSIDE else []),
    ):
        with pytest.raises(pydantic.ValidationError, match="path"):
            Download.model_validate(base | field)


def test_a_hash_of_a_download_is_one() -> None:
    with pytest.raises(pydantic.ValidationError, match="sha256"):
        Download(kind="archives", urls={"a": "http://x/a"}, sha256={"a": "0"})


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_row_reads_below_its_folders_alone(path: str) -> None:
    for field in ({"files": {"train": path}}, {"media": [path]}, {"raw": path}, {"media_from": [path]}):
        with pytest.raises(pydantic.ValidationError):
            Row.model_validate(ROW | field)
    with pytest.raises(pydantic.ValidationError):
        Exclusion(column="a", files=path, values="b")
    with pytest.raises(pydantic.ValidationError):
        Exclusion(column="a", files="x", values="b", raw=path)
    with pytest.raises(pydantic.ValidationError):
        Lookup(name="a", files=path)
    with pytest.raises(pydantic.ValidationError):
        Masks(files=path)
    if path:
        with pytest.raises(pydantic.ValidationError):
            Skip(columns=("a",), files=path, values=("a",), source="x")
    folder = Folder(download=Download(kind="none"))
    with pytest.raises(pydantic.ValidationError):
        Catalog(preset="tiny", tokenizer="x", stages={}, rows=(), folders={path: folder})


@pytest.mark.parametrize("base", ["../../x", "/etc", "a/b", "..", "."])
def test_a_catalog_is_based_on_one_of_this_project(tmp_path: Path, base: str) -> None:
    (tmp_path / "own.yaml").write_text(f"base: {base}\n")
    with pytest.raises(CatalogError, match="is no name of a catalog"):
        load_catalog(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize("part", ["..", "../other", "/", "inner/../.."])
def test_a_column_before_any_folder_does_not_lead_out(tmp_path: Path, part: str) -> None:
    for place in (tmp_path / "raw/inner/deep", tmp_path / "other/secret", tmp_path / "secret"):
        place.mkdir(parents=True)
        (place / "1.jpg").write_bytes(b"x")
    part = part if part != "/" else str(tmp_path / "other")
    media = MediaFiles(root=tmp_path / "raw", templates=("{part}/*/{value}",))
    assert media.image("1.jpg", row={"part": "inner"}).path == str(tmp_path / "raw/inner/deep/1.jpg")
    with pytest.raises(RejectedError, match="lies outside of"):
        media.image("1.jpg", row={"part": part})
