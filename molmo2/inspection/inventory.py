"""The inventory of a catalog on this machine: raw folders, built shards, and the commands that get the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.build.claim import BUILD_NAME
from shards.catalog import Catalog, Row, Stage
from shards.download.manifest import fetches, missing_folders, unfinished_folders
from shards.format import INDEX_NAME, FormatError, Totals, parse_index

Raw = Literal["there", "unfinished", "missing", "by hand", "to be made"]
Built = Literal["built", "unfinished", "damaged", "not built"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One dataset in one stage.

    Attributes:
        raw: state of the raw data. "by hand": it is missing, and a person must get it; "to be made": a tool of this
            project makes it.
        raw_bytes: size on disk of all folders that the row reads.
        totals: totals of the finished shards; None without them.
    """

    row: Row
    stage: Stage
    raw: Raw
    raw_bytes: int
    built: Built
    totals: Totals | None


def inventory(catalog: Catalog, stages: Sequence[Stage], raw: Path, shards: Path) -> Iterator[Entry]:
    """Yield an entry for every dataset of the stages, in the catalog's order."""
    sizes: dict[str, int] = {}
    for stage in stages:
        for row in catalog.select(stage):
            built, totals = _built(shards / stage / row.name)
            for name in row.folders:
                if name not in sizes:
                    sizes[name] = folder_bytes(raw / name)
            yield Entry(
                row=row,
                stage=stage,
                raw=_raw(catalog, row, raw),
                raw_bytes=sum(sizes[name] for name in row.folders),
                built=built,
                totals=totals,
            )


def _raw(catalog: Catalog, row: Row, raw: Path) -> Raw:
    missing = missing_folders(catalog, row, raw)
    if unfinished_folders(catalog, row, raw):
        return "unfinished"
    if not missing:
        return "there"
    downloads = catalog.downloads([row])
    lacking = [downloads[name] for name in missing if name in downloads]
    if any(fetches(download) for download in lacking):
        return "missing"
    return "by hand" if any(download.kind == "manual" for download in lacking) else "to be made"


def _built(folder: Path) -> tuple[Built, Totals | None]:
    try:
        return "built", parse_index((folder / INDEX_NAME).read_bytes(), str(folder / INDEX_NAME)).totals
    except FileNotFoundError:
        return ("unfinished" if (folder / BUILD_NAME).exists() else "not built"), None
    except (FormatError, IsADirectoryError, NotADirectoryError):
        return "damaged", None


def folder_bytes(folder: Path) -> int:
    """Total size of all files below a folder in bytes; 0 if the folder does not exist."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:  # removed by a running download
                continue
    return total


def commands(entries: Sequence[Entry], catalog_name: str) -> list[str]:
    """Lines with the commands that get everything that is missing; data that a person must get come last."""
    lines = []
    catalog = f" --catalog {catalog_name}"
    training, evaluation = ([e for e in entries if (e.stage == "eval") is which] for which in (False, True))
    for flag, some in (("", training), (" --stage eval", evaluation)):  # a name may stand for a row of both
        if fetch := dict.fromkeys(e.row.name for e in some if e.raw in {"missing", "unfinished"}):
            lines.append(f"fetch: python tools/download_data.py{catalog}{flag} --datasets {' '.join(fetch)}")
    for stage in dict.fromkeys(entry.stage for entry in entries):
        ready = [e.row.name for e in entries if e.stage == stage and e.raw == "there" and e.built != "built"]
        if ready:
            lines.append(f"build: python tools/build_shards.py --stage {stage}{catalog} --datasets {' '.join(ready)}")
    if any(entry.raw == "to be made" for entry in entries):
        lines.append("make: `make demo` makes the demo's data; or set MOLMO2_DATA to where the data lie")
    for flag, some in (("", training), (" --stage eval", evaluation)):
        if by_hand := dict.fromkeys(e.row.name for e in some if e.raw == "by hand"):
            manual = "python tools/download_data.py --show-manual-instructions"
            lines.append(f"by hand: {manual}{catalog}{flag} --datasets {' '.join(by_hand)}")
    return lines
