"""A row of the catalog: where a dataset lies, how it gets there, and how its rows are read.

Plain data, checked by pydantic. What a column means is the converter's business; how rows become a catalog is that of
`shards.catalog`.
"""

from __future__ import annotations

import re
import string
import typing
from collections.abc import Callable
from typing import Any, Literal, Self

import pydantic

STAGES = ("pretraining", "sft", "long", "eval")
Stage = Literal["pretraining", "sft", "long", "eval"]


class Strict(pydantic.BaseModel):
    """A frozen model without unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Download(Strict):
    """How a raw folder is filled. Paths are relative to the folder.

    Attributes:
        kind: "hub": files of a Hugging Face dataset repository; "hub-urls": those, and the images whose URLs one of
            their columns holds; "archives": files from fixed URLs, with or without a repository; "manual": some of it
            only a person can get, `instructions` say how, the rest as above; "none": made by a tool of this project.
        repo: Hugging Face dataset repository.
        revision: commit or branch of it; None: not pinned yet, the newest.
        include: globs of the files of `repo`.
        urls: path of a file -> its URL.
        sha256: path of a file of `urls` -> hash of its bytes, where somebody has published one.
        extract: path or glob of an archive -> folder that it is unpacked into.
        url_column: column (or column of lists) with image URLs.
        sha256_column: column with the sha256 of the images' bytes.
        instructions: what a person must do, in words.
    """

    kind: Literal["hub", "hub-urls", "archives", "manual", "none"]
    repo: str | None = None
    revision: str | None = None
    include: tuple[str, ...] = ()
    urls: dict[str, str] = {}
    sha256: dict[str, str] = {}
    extract: dict[str, str] = {}
    url_column: str | None = None
    sha256_column: str | None = None
    instructions: str = ""

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"hub": "repo", "hub-urls": "url_column", "archives": "urls", "manual": "instructions"}.get(self.kind)
        missing = [name for name in [needed] if name is not None and not getattr(self, name)]
        if (self.kind == "hub-urls" and not self.repo) or (self.repo and not self.include):
            missing.append("include" if self.repo else "repo")
        if missing:
            raise ValueError(f"a download of kind {self.kind!r} needs {', '.join(missing)}")
        return self


class Size(Strict):
    """How much there is, as published; None where nobody has said."""

    rows: int | None = None
    gb: float | None = None


class Folder(Strict):
    """A raw folder that several rows share: one download read in two ways, or a pool of media."""

    source: dict[str, str] = {}
    size: Size = Size()
    download: Download
    notes: tuple[str, ...] = ()


Op = Literal[
    "equals",
    "not_equals",
    "in",
    "not_in",
    "min",
    "max",
    "min_length",
    "max_length",
    "not_null",
    "not_empty",
    "not_matches",
]


class Filter(Strict):
    """Rows stay where `column` stands so to `value`; a null stays only under "not_equals", "not_in", "min", "max".

    Attributes:
        column: name or dotted path of a column.
        op: "min" and "max" include the value itself, "min_length" and "max_length" count a list's items; "not_null"
            and "not_empty" need no value; "not_matches" takes a regular expression for the whole of a text.
        value: what to compare with; a list for "in" and "not_in".
        stages: where it applies; empty: everywhere.
    """

    column: str
    op: Op
    value: Any = None
    stages: tuple[Stage, ...] = ()

    @pydantic.model_validator(mode="after")
    def _fitting(self) -> Self:
        alone = self.op in {"not_null", "not_empty"}
        if alone != (self.value is None) or (self.op in {"in", "not_in"}) != isinstance(self.value, list):
            raise ValueError(f"filter on {self.column}: op {self.op} and value {self.value!r} do not go together")
        return self

    def keeps(self, found: Any) -> bool:
        """Whether a row with this value of the column stays."""
        if self.op == "not_empty":
            return found is not None and found != "" and found != []
        if found is None:
            return self.op in {"not_equals", "not_in", "min", "max", "not_matches"}
        tests: dict[str, Callable[[], Any]] = {
            "equals": lambda: found == self.value,
            "not_equals": lambda: found != self.value,
            "in": lambda: found in self.value,
            "not_in": lambda: found not in self.value,
            "min": lambda: found >= self.value,
            "max": lambda: found <= self.value,
            "min_length": lambda: len(found) >= self.value,
            "max_length": lambda: len(found) <= self.value,
            "not_null": lambda: True,
            "not_matches": lambda: not re.fullmatch(self.value, str(found)),
        }
        return bool(tests[self.op]())


class TableFormat(Strict):
    """How files of rows are read.

    Attributes:
        kind: by default what the file's suffix says (.parquet, .arrow, .json, .jsonl, .csv, .tsv); "lines" is text with
            a row in each line.
        records: dotted path of the list of rows in a JSON document; "" is the document itself. Where there is an
            object, its values are the rows. "." makes the document one row.
        key: name under which a row gets its key in that object.
        explode: column with a list (or an object) in every row; each of its items becomes a row that has the outer
            columns as well, the item's own being "qas.question" for `explode: qas`.
        header: names of the columns of a CSV without a header line.
        skip: lines before the first row or the header.
        names_first: JSON lines that are lists, the first with the names of the columns.
        pattern: regular expression of a whole line whose named groups are the columns, for kind "lines".
        number: name under which such a row gets its number, from "0".
    """

    kind: Literal["parquet", "arrow", "json", "jsonl", "csv", "tsv", "lines"] | None = None
    records: str = ""
    key: str | None = None
    explode: str | None = None
    header: tuple[str, ...] = ()
    skip: int = 0
    names_first: bool = False
    pattern: str = ""
    number: str | None = None


class Exclusion(Strict):
    """Rows are left out whose `column` has a value that other files list.

    Attributes:
        column: name or dotted path of a column.
        keep: the other way round, those rows stay and all others are left out.
        files: glob of the files with the list, below the raw folder.
        raw: another raw folder with those files.
        table: how they are read.
        values: their column.
        template: what makes a listed `{value}` into a value of `column`.
    """

    column: str
    keep: bool = False
    files: str
    raw: str | None = None
    table: TableFormat = TableFormat()
    values: str
    template: str = "{value}"


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Lookup(Strict):
    """Another table of the raw folder, of which each row gets the matching row; null where there is none.

    Attributes:
        name: what its columns are called: "NAME.column". In an object of plain values they are in the column "value".
        files: glob of its files.
        table: how they are read.
        key: its column that is looked up; unique, else the first counts. Without it the n-th row belongs to the n-th.
        column: the row's column that is looked for; of a list every item is.
    """

    name: str
    files: str
    table: TableFormat = TableFormat()
    key: str | None = None
    column: str | None = None

    @pydantic.model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.key is None) != (self.column is None):
            raise ValueError(f"lookup {self.name}: `key` and `column` belong together")
        return self


class Masks(Strict):
    """Masks that lie in image files: the fact `masks` of a row's questions in stage "eval".

    Attributes:
        files: template of an image file, `{NAME}` being a column's value. With a "*" in the file's name those are the
            frames of a video, in the order of their names; a "*" further up is any part of a folder's name.
        objects: column with the ids of the objects. Each has files of its own if `files` holds `{object}`, else its id
            is the value of its pixels.
        above: a pixel belongs to the mask where its value is greater, unless ids are pixel values.
    """

    files: str
    objects: str | None = None
    above: int = 0

    @property
    def columns(self) -> set[str]:
        """The columns that it reads."""
        named = {name for _, name, _, _ in string.Formatter().parse(self.files) if name}
        return (named - {"object"}) | ({self.objects} if self.objects else set())


class Row(Strict):
    """One dataset as it becomes shards. Paths are relative to `raw/<folder>/`.

    Attributes:
        name: folder of the shards and name in mixtures.
        layout_of: the published dataset whose layout this one has, if it is not that dataset itself.
        raw: the raw folder, another row's or one of the catalog's `folders`, if it is not the row's own.
        source: repository, revision, licence, in words that are written into the index.
        size: how much there is.
        paper: numbers that the Molmo2 paper gives for it: examples, rate_percent; `_with` names the rows that share
            them.
        download: how the raw folder is filled, where it is the row's own.
        stages: where it is used.
        files: glob of the files of each split; stage "eval" reads "validation", the others "train".
        table: how they are read.
        converter: a name in `shards.convert.CONVERTERS`.
        columns: what the converter's fields are called in the files; dotted for a field of a struct ("meta.id").
        facts: name -> column that a metric reads beside the answer; kept with every question of stage "eval".
        masks: masks in files, another fact.
        optional: columns that some of the files lack; they are null there.
        lookups: tables that are joined to the rows.
        group_by: column whose equal values make one example (one image or video), or None: a row is an example.
        filters: which rows stay; the others are recorded as left out.
        exclude: rows that another file lists, a benchmark's images for instance, or that it does not.
        options: parameters of the converter.
        loss_weight: flat weight of a loss token by stage; a stage that is not named follows the length rule.
        media: template of a media file's path, or several to try in order; `{value}` is the media column's value,
            `{NAME}` another column's, and formats like `{value:012d}` work. It may hold one "*/", any folder, and end
            with ".*", any suffix of a video. For a video of images it names their folder.
        media_from: raw folders in which media are looked for after the row's own.
        notes: what is not known or worth knowing; for readers.
    """

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    layout_of: str | None = None
    raw: str | None = None
    source: dict[str, str] = {}
    size: Size = Size()
    paper: dict[str, Any] = {}
    download: Download | None = None
    stages: tuple[Stage, ...] = pydantic.Field(min_length=1)
    files: dict[Literal["train", "validation"], str]
    table: TableFormat = TableFormat()
    converter: str
    columns: dict[str, str]
    facts: dict[str, str] = {}
    masks: Masks | None = None
    optional: tuple[str, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    group_by: str | None = None
    filters: tuple[Filter, ...] = ()
    exclude: tuple[Exclusion, ...] = ()
    options: dict[str, Any] = {}
    loss_weight: dict[Stage, float] = {}
    media: typing.Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    media_from: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the raw folder."""
        return self.raw or self.name

    @property
    def folders(self) -> tuple[str, ...]:
        """All raw folders that are read, the row's own first."""
        others = [*self.media_from, *(e.raw for e in self.exclude if e.raw)]
        return tuple(dict.fromkeys([self.folder, *others]))

    def used_columns(self, stage: Stage) -> list[str]:
        """Every column that is read, sorted; dotted paths as they are."""
        parts: tuple[Filter | Exclusion | Lookup, ...] = (*self.filters, *self.exclude, *self.lookups)
        others = {part.column for part in parts if part.column is not None}
        if stage == "eval":
            others |= {*self.facts.values(), *(self.masks.columns if self.masks else ())}
        return sorted({*self.columns.values(), *others, *([self.group_by] if self.group_by else [])})

    def build_settings(self) -> dict[str, Any]:
        """What the samples depend on: all but the words about the row."""
        words = {"layout_of", "raw", "source", "size", "paper", "download", "stages", "notes"}
        return self.model_dump(mode="json", exclude=words, exclude_defaults=True)

    @pydantic.model_validator(mode="after")
    def _splits(self) -> Self:
        for stage in self.stages:
            if split_of(stage) not in self.files:
                raise ValueError(f"stage {stage} needs files.{split_of(stage)}")
        return self


def split_of(stage: str) -> Literal["train", "validation"]:
    """The split that a stage reads."""
    return "validation" if stage == "eval" else "train"
