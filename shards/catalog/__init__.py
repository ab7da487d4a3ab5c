"""The catalog: one row per dataset, as data. Beside this file: `NAME.yaml`, or `NAME/` with a file per family.

A row gives the location of a dataset, how it is downloaded, its converter, the names of its columns, its filters, and
its loss weight. The converter defines what a column means; the recipe defines how the datasets are mixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import pydantic

from shards.catalog.converters import converter_problems
from shards.catalog.nearest import known_keys, nearest
from shards.catalog.row import (
    STAGES,
    BenchmarkSpec,
    Download,
    Exclusion,
    Filter,
    Folder,
    FolderName,
    Lookup,
    Masks,
    Row,
    Size,
    Skip,
    Stage,
    Strict,
    TableFormat,
)
from shards.catalog.templates import CatalogError, read_catalog_file
from shards.schema import Limits

__all__ = [
    "STAGES",
    "BenchmarkSpec",
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
    "Skip",
    "Stage",
    "StageSettings",
    "TableFormat",
    "load_catalog",
]


class StageSettings(Strict):
    """Build settings of a stage.

    Attributes:
        num_variants: text variants of a sample; training takes another one in every epoch.
        examples_per_shard: number of examples that a shard is built from.
        limits: what a sample may hold.
        rebuilds: a stage with narrower limits, whose other datasets a run of this stage reads as well. Those that lost
            much to the limits are built again in this stage.
    """

    num_variants: int = pydantic.Field(ge=1, le=64)
    examples_per_shard: int = pydantic.Field(gt=0)
    limits: Limits
    rebuilds: Stage | None = None

    @pydantic.field_validator("limits", mode="before")
    @classmethod
    def _no_other_limits(cls, value: Any) -> Any:
        unknown = sorted(set(value) - {field.name for field in fields(Limits)}) if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        return value


class Catalog(Strict):
    """The rows of a catalog, the build settings of each stage, and the model preset that the shards are built for.

    Attributes:
        preset: the model that the shards are built for.
        tokenizer: its tokenizer, a folder of the raw data.
        stages: stage -> its build settings.
        rows: the datasets.
        folders: raw folders that do not belong to a single row, by name.
        left_out: published datasets that have no row -> the reason.
        styles: styles that the rows may name besides `shards.catalog.styles.STYLES`.
        evaluation: the catalog with the rows and the build settings of stage "eval", in a file by its name; None if
            this catalog has its own. Its rows may have the names and raw folders of rows of this one: a folder holds
            what both want.
    """

    preset: str
    tokenizer: str
    stages: dict[Stage, StageSettings]
    rows: tuple[Row, ...]
    folders: dict[FolderName, Folder] = pydantic.Field(default_factory=dict)
    left_out: dict[str, str] = pydantic.Field(default_factory=dict)
    styles: tuple[str, ...] = ()
    evaluation: Catalog | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _settings_of_held_out_rows(cls, data: Any) -> Any:
        """Stage "eval" of a catalog without settings for it is built like the stage that is trained."""
        stages, rows = (data.get("stages"), data.get("rows")) if isinstance(data, dict) else (None, None)
        if not isinstance(stages, dict) or not isinstance(rows, list | tuple) or "eval" in stages:
            return data
        trained = stages.get("sft", next(iter(stages.values()), None))
        if isinstance(trained, dict) and any(isinstance(row, dict) and row.get("held_out") for row in rows):
            own = {name: value for name, value in trained.items() if name != "rebuilds"}
            return {**data, "stages": {**stages, "eval": {**own, "num_variants": 1}}}
        return data

    @pydantic.model_validator(mode="after")
    def _one_evaluation(self) -> Self:
        if self.evaluation is None:
            return self
        if own := [row.name for row in self.rows if "eval" in row.stages]:
            raise ValueError(f"rows of stage eval belong into the catalog `evaluation`: {', '.join(own)}")
        if other := [row.name for row in self.evaluation.rows if row.stages != ("eval",)]:
            raise ValueError(f"the catalog `evaluation` has rows of other stages: {', '.join(other)}")
        for name, download in self._known_downloads().items():
            if (second := self.evaluation._known_downloads().get(name)) is not None:
                try:
                    download.joined(second)
                except ValueError as error:
                    raise ValueError(f"folder {name}: training and evaluation cannot share it: {error}") from None
        return self

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [row.name for row in self.rows]
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rows with the same name: {', '.join(double)}")
        if problems := [problem for row in self.rows for problem in converter_problems(row, self.styles)]:
            raise ValueError("\n  ".join(problems))
        own = {row.name for row in self.rows if row.raw is None}
        for row in self.rows:
            for folder in row.folders[row.raw is None :]:
                if folder not in own and folder not in self.folders:
                    raise ValueError(f"row {row.name}: raw folder {folder!r} is neither a row's nor in `folders`")
            if row.raw and row.download:
                raise ValueError(f"row {row.name}: its raw folder is another one (`raw: {row.raw}`); remove `download`")
        return self

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The rows of this catalog and of its catalog of evaluation; two of them may have the same name."""
        return (*self.rows, *(self.evaluation.rows if self.evaluation else ()))

    def downloads(self, rows: Iterable[Row]) -> dict[str, Download]:
        """Raw folders that these rows read, media folders included -> how each is downloaded, for all of the rows."""
        wanted: dict[str, Download] = {}
        own, others = self._known_downloads(), self.evaluation._known_downloads() if self.evaluation else {}
        for row in rows:
            known = others if self.evaluation and "eval" in row.stages else own
            for name in row.folders:
                if name in known:
                    wanted[name] = wanted[name].joined(known[name]) if name in wanted else known[name]
        return wanted

    def _known_downloads(self) -> dict[str, Download]:
        known = {name: folder.download for name, folder in self.folders.items()}
        return known | {row.name: row.download for row in self.rows if row.download is not None}

    def how_to_get(self, row: Row) -> str:
        """Instructions for the user when the raw files of a row are missing."""
        downloads = self.downloads([row])
        steps = [f"{name}: {download.instructions}" for name, download in downloads.items() if download.instructions]
        flag = " --stage eval" if row.stages == ("eval",) else ""
        command = f"python tools/download_data.py{flag} --datasets {row.name}"
        if not downloads:
            return "make the data first (`make demo` makes the demo's), or set MOLMO2_DATA to the folder that holds it"
        fetched = any(download.kind not in {"manual", "none"} or download.repo for download in downloads.values())
        return "\n  ".join([*([f"fetch it: {command}"] if fetched else []), *steps])

    def rebuilt(self, stage: Stage) -> list[Row]:
        """Rows of the stage that this one `rebuilds`, and that this stage does not have, as rows of this stage."""
        other = self.stages[stage].rebuilds if stage in self.stages else None
        return [
            row.model_copy(
                update={
                    "stages": (*row.stages, stage),
                    "loss_weight": {stage: row.loss_weight[other], **row.loss_weight}
                    if other in row.loss_weight
                    else row.loss_weight,
                }
            )
            for row in self.rows
            if other in row.stages and stage not in row.stages
        ]

    def select(self, stage: Stage, names: list[str] | None = None) -> list[Row]:
        """The rows of a stage, or only those with the given names.

        Raises:
            CatalogError: a name that is unknown or not in this stage.
        """
        rows = {row.name: row for row in self.all_rows if stage in row.stages}
        unknown = [name for name in names or [] if name not in rows]
        if unknown:
            raise CatalogError(f"not in stage {stage}: {', '.join(unknown)}; known: {', '.join(rows)}")
        return [row for name, row in rows.items() if names is None or name in names]

    def require(self, stage: Stage, names: list[str] | None = None) -> list[Row]:
        """`select`, for a command that has nothing to do without rows.

        Raises:
            CatalogError: no row has this stage, or the catalog has no build settings for it; see also `select`.
        """
        if not (rows := self.select(stage, names)):
            raise self.no_rows(stage)
        if stage not in self.stages:
            known = ", ".join(self.stages) or "none"
            raise CatalogError(f"the catalog has no settings for stage {stage} in `stages`; it has {known}")
        return rows

    def no_rows(self, stage: str) -> CatalogError:
        """The error of a command whose stage has no rows."""
        stages = ", ".join(other for other in STAGES if any(other in row.stages for row in self.all_rows))
        return CatalogError(f"no dataset of the catalog has stage {stage}; it has {stages or 'no rows'}")


def load_catalog(name: str) -> Catalog:
    """Load a catalog of this folder by its name, or a YAML file or a folder of YAML files by its path.

    `base: NAME` inherits every setting from another catalog; settings of this file override them. `evaluation: NAME`
    takes the rows and the build settings of stage "eval" from another catalog (a YAML file is beside this one). A file
    with `rows` of its own inherits these build settings alone.

    In a folder, `catalog.yaml` holds the settings and every other file holds `rows` and `folders`. Each file may have
    `templates`; a mapping of the same file inherits their keys with `like: NAME` (see `shards.catalog.templates`).

    Raises:
        CatalogError: the catalog does not exist, or has errors; all of them are listed.
    """
    here = Path(__file__).parent
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else here / name
    path = path if path.exists() or path.suffix else path.with_suffix(".yaml")
    if not path.exists():
        known = ", ".join(sorted({p.stem for p in [*here.glob("*.yaml"), *(q.parent for q in here.glob("*/*.yaml"))]}))
        raise CatalogError(f"no catalog {name!r}; known: {known}, or the path of a YAML file")
    content = _merge_files(path) if path.is_dir() else read_catalog_file(path)
    own = frozenset(content)
    if base := content.pop("base", None):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", str(base)):
            raise CatalogError(f"{path}: `base` {base!r} is no name of a catalog of this project, such as molmo2")
        content = {**_merge_files(here / base), **content}
    if evaluation := content.pop("evaluation", None):
        joined = load_catalog(str(path.parent / evaluation) if evaluation.endswith(".yaml") else evaluation)
        if "eval" not in joined.stages:
            raise CatalogError(f"{path}: the catalog {evaluation!r}, its `evaluation`, has no settings for stage eval")
        content["stages"] = {"eval": joined.stages["eval"], **(content.get("stages") or {})}
        if "rows" not in own or "evaluation" in own:
            content["evaluation"] = joined
    try:
        return Catalog.model_validate(content)
    except pydantic.ValidationError as error:
        problems = [f"{_place(content, e['loc'])}{_reason(e)}" for e in error.errors()]
        raise CatalogError("\n  ".join([f"{path}: the catalog has errors", *problems])) from None


def _place(content: dict[str, Any], loc: tuple[int | str, ...]) -> str:
    """Where an error is: "row NAME: options.style: " or "stages.sft: "; "" for the whole catalog."""
    if loc[:1] == ("rows",) and len(loc) > 1 and isinstance(row := content["rows"][loc[1]], dict) and "name" in row:
        return f"row {row['name']}: " + "".join(f"{part}: " for part in [".".join(map(str, loc[2:]))] if part)
    return f"{'.'.join(map(str, loc))}: " if loc else ""


def _reason(error: Any) -> str:
    """What is wrong: an unknown key with the nearest known one, else what pydantic says."""
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    return f"unknown key; {nearest(str(error['loc'][-1]), known_keys(Catalog, error['loc'][:-1]))}"


def _merge_files(folder: Path) -> dict[str, Any]:
    """Merge the settings of a folder with the rows and raw folders of all its other files (families)."""
    catalog = {"rows": [], "folders": {}, **read_catalog_file(folder / "catalog.yaml")}
    for path in sorted(folder.glob("*.yaml")):
        if path.name == "catalog.yaml":
            continue
        family = read_catalog_file(path)
        if unknown := sorted(set(family) - {"rows", "folders"}):
            raise CatalogError(f"{path}: unknown: {', '.join(unknown)}; a family has rows, folders and templates")
        folders = family.get("folders") or {}
        if double := sorted(set(folders) & set(catalog["folders"])):
            raise CatalogError(f"{path}: folders that another file has too: {', '.join(double)}")
        catalog["rows"] += family.get("rows") or []
        catalog["folders"] |= folders
    return catalog
