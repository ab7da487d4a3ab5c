"""The catalog: one row per dataset, as data. `*.yaml` beside this file, each a named set of rows.

A row says where a dataset lies, which converter reads it, what its columns are called, and what it weighs. What a
column means is the converter's business; how the sets are mixed is the recipe's.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from shards.schema import Limits

STAGES = ("pretraining", "sft", "long", "eval")
Stage = Literal["pretraining", "sft", "long", "eval"]


class CatalogError(ValueError):
    """A catalog that cannot be read, or a name that is not in it."""


class Row(pydantic.BaseModel, extra="forbid", frozen=True):
    """One dataset. Paths are relative to `raw/<name>/`.

    Attributes:
        name: folder of the shards and name in mixtures.
        like: the published dataset whose layout this one has, if it is not that dataset itself.
        source: repository, revision, licence, in words that are written into the index.
        stages: where it is used.
        files: glob of the parquet files of each split; stage "eval" reads "validation", the others "train".
        converter: a name in `shards.convert.CONVERTERS`.
        columns: what the converter's fields are called in the files.
        group_by: column whose equal values make one example (one image or video), or None: a row is an example.
        options: parameters of the converter.
        loss_weight: flat weight of a loss token by stage; a stage that is not named follows the length rule.
        media: template of a media file's path, `{value}` being the media column's value.
    """

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    like: str | None = None
    source: dict[str, str] = {}
    stages: tuple[Stage, ...] = pydantic.Field(min_length=1)
    files: dict[Literal["train", "validation"], str]
    converter: str
    columns: dict[str, str]
    group_by: str | None = None
    options: dict[str, Any] = {}
    loss_weight: dict[Stage, float] = {}
    media: str | None = None

    @property
    def used_columns(self) -> list[str]:
        """Every column that is read, sorted."""
        return sorted({*self.columns.values(), *([self.group_by] if self.group_by else [])})

    def build_settings(self) -> dict[str, Any]:
        """What the samples depend on: all but the words about the row."""
        return self.model_dump(mode="json", exclude={"like", "source", "stages"})

    @pydantic.model_validator(mode="after")
    def _splits(self) -> Row:
        for stage in self.stages:
            if split_of(stage) not in self.files:
                raise ValueError(f"stage {stage} needs files.{split_of(stage)}")
        return self


class StageSettings(pydantic.BaseModel, extra="forbid", frozen=True):
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


class Catalog(pydantic.BaseModel, extra="forbid", frozen=True):
    """A named set of rows with the build settings of its stages and the model preset that they are for."""

    preset: str
    tokenizer: str
    stages: dict[Stage, StageSettings]
    rows: tuple[Row, ...]

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


def split_of(stage: str) -> Literal["train", "validation"]:
    """The split that a stage reads."""
    return "validation" if stage == "eval" else "train"


def load_catalog(name: str) -> Catalog:
    """A catalog of this folder by name, or any YAML file by path.

    Raises:
        CatalogError: no such catalog, or errors in it, all of them listed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).with_name(f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
        raise CatalogError(f"no catalog {name!r}; known: {known}, or the path of a YAML file")
    try:
        return Catalog.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, pydantic.ValidationError) as error:
        raise CatalogError(f"{path}: {error}") from None
