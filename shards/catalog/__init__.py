"""The catalog: one row per dataset, as data. Beside this file: `NAME.yaml`, or `NAME/` with a file per family.

A row says where a dataset lies and how it gets there, which converter reads it, what its columns are called, what is
left out, and what it weighs. What a column means is the converter's business; how the sets are mixed is the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import pydantic

from shards.catalog.row import (
    STAGES,
    Download,
    Exclusion,
    Filter,
    Folder,
    Lookup,
    Masks,
    Row,
    Size,
    Stage,
    Strict,
    TableFormat,
    split_of,
)
from shards.catalog.templates import CatalogError, read_catalog_file
from shards.schema import Limits

__all__ = [
    "STAGES",
    "Catalog",
    "CatalogError",
    "Download",
    "Exclusion",
    "Filter",
    "Folder",
    "Lookup",
    "Masks",
    "Row",
    "Size",
    "Stage",
    "StageSettings",
    "TableFormat",
    "load_catalog",
    "split_of",
]


class StageSettings(Strict):
    """How a stage of a catalog is built: limits of a sample, text variants, examples per shard."""

    num_variants: int = pydantic.Field(ge=1, le=64)
    examples_per_shard: int = pydantic.Field(gt=0)
    limits: Limits

    @pydantic.field_validator("limits", mode="before")
    @classmethod
    def _no_other_limits(cls, value: Any) -> Any:
        unknown = sorted(set(value) - {field.name for field in fields(Limits)}) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        return value


class Catalog(Strict):
    """A named set of rows with the build settings of its stages and the model preset that they are for.

    Attributes:
        folders: raw folders that belong to no single row.
        left_out: published training datasets without a row, and why.
    """

    preset: str
    tokenizer: str
    stages: dict[Stage, StageSettings]
    rows: tuple[Row, ...]
    folders: dict[str, Folder] = pydantic.Field(default_factory=dict)
    left_out: dict[str, str] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [row.name for row in self.rows]
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rows with the same name: {', '.join(double)}")
        own = {row.name for row in self.rows if row.raw is None}
        for row in self.rows:
            for folder in row.folders[row.raw is None :]:
                if folder not in own and folder not in self.folders:
                    raise ValueError(f"row {row.name}: raw folder {folder!r} is neither a row's nor in `folders`")
            if row.raw and row.download:
                raise ValueError(f"row {row.name}: `raw: {row.raw}` says already where it comes from; drop `download`")
        return self

    def downloads(self, rows: Iterable[Row]) -> dict[str, Download]:
        """The raw folders that these rows read, media included, and how each is filled."""
        known = {name: folder.download for name, folder in self.folders.items()}
        known |= {row.name: row.download for row in self.rows if row.download is not None}
        wanted = dict.fromkeys(name for row in rows for name in row.folders)
        return {name: known[name] for name in wanted if name in known}

    def how_to_get(self, row: Row) -> str:
        """What to do about a row whose raw files are not there."""
        downloads = self.downloads([row])
        steps = [f"{name}: {download.instructions}" for name, download in downloads.items() if download.instructions]
        command = f"python tools/download_data.py --datasets {row.name}"
        if not downloads:
            return "make it first (`make demo` does it for the demo), or set MOLMO2_DATA to where it lies"
        fetched = any(download.kind not in {"manual", "none"} or download.repo for download in downloads.values())
        return "\n  ".join([*([f"fetch it: {command}"] if fetched else []), *steps])

    def select(self, stage: Stage, names: list[str] | None = None) -> list[Row]:
        """Rows of a stage, all or those named.

        Raises:
            CatalogError: a name that is unknown or not in this stage.
        """
        rows = {row.name: row for row in self.rows if stage in row.stages}
        unknown = [name for name in names or [] if name not in rows]
        if unknown:
            raise CatalogError(f"not in stage {stage}: {', '.join(unknown)}; known: {', '.join(rows)}")
        return [row for name, row in rows.items() if names is None or name in names]


def load_catalog(name: str) -> Catalog:
    """A catalog of this folder by name, or any YAML file or folder of them by path.

    `base: NAME` takes everything from another catalog but the settings that are given.

    In a folder `catalog.yaml` holds the settings, every other file `rows` and `folders`. Any of these files may have
    `templates`, whose keys its own mappings take over with `like: NAME` (see `shards.catalog.templates`).

    Raises:
        CatalogError: no such catalog, or errors in it, all of them listed.
    """
    here = Path(__file__).parent
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else here / name
    path = path if path.exists() or path.suffix else path.with_suffix(".yaml")
    if not path.exists():
        known = ", ".join(sorted({p.stem for p in [*here.glob("*.yaml"), *(q.parent for q in here.glob("*/*.yaml"))]}))
        raise CatalogError(f"no catalog {name!r}; known: {known}, or the path of a YAML file")
    try:
        found = _joined(path) if path.is_dir() else read_catalog_file(path)
        if base := found.pop("base", None):
            return Catalog.model_validate({**_joined(here / base), **found})
        return Catalog.model_validate(found)
    except pydantic.ValidationError as error:
        raise CatalogError(f"{path}: {error}") from None


def _joined(folder: Path) -> dict[str, Any]:
    """The settings of a folder with the rows and raw folders of all its families."""
    whole = {"rows": [], "folders": {}, **read_catalog_file(folder / "catalog.yaml")}
    for path in sorted(folder.glob("*.yaml")):
        if path.name == "catalog.yaml":
            continue
        family = read_catalog_file(path)
        if unknown := sorted(set(family) - {"rows", "folders"}):
            raise CatalogError(f"{path}: unknown: {', '.join(unknown)}; a family has rows, folders and templates")
        folders = family.get("folders") or {}
        if double := sorted(set(folders) & set(whole["folders"])):
            raise CatalogError(f"{path}: folders that another file has too: {', '.join(double)}")
        whole["rows"] += family.get("rows") or []
        whole["folders"] |= folders
    return whole
