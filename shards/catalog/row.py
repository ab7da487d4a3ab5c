"""A row of the catalog: the location of a dataset, how it is downloaded, and how its rows are read.

The models are plain data, validated by pydantic. The converter defines what a column means; `shards.catalog` collects
rows into a catalog.
"""

from __future__ import annotations

import fnmatch
import re
import string
import typing
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, Self

import pydantic

from shards.sources.paths import inside, own_file

OWN_NEW_TOKENS = 128  # longest answer of a benchmark that only names its metric
STAGES = ("pretraining", "sft", "long", "eval")
Stage = Literal["pretraining", "sft", "long", "eval"]


def _named(path: str) -> str:
    if own_file(PurePosixPath(inside(path))):
        raise ValueError(f"path {path!r} is that of a file of the downloader itself")
    return path


Inside = typing.Annotated[str, pydantic.AfterValidator(inside)]  # a path or a glob relative to a raw folder
Named = typing.Annotated[str, pydantic.AfterValidator(_named)]  # the same of a file or folder that is written
FolderName = typing.Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Hex = typing.Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(pydantic.BaseModel):
    """A frozen pydantic model that refuses unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Download(Strict):
    """How a raw folder is downloaded. Paths are relative to the folder.

    Attributes:
        kind: "hub": files of a Hugging Face dataset repository; "hub-urls": those files, and the images whose URLs are
            in `url_column`; "archives": files from fixed URLs, with or without a repository; "manual": a person must
            get some files by hand (see `instructions`), the others are downloaded as above; "none": a tool of this
            project makes the data.
        repo: Hugging Face dataset repository.
        revision: commit or branch of `repo`; None is the newest commit (not pinned).
        include: globs of the files of `repo` to download.
        urls: path of a file -> its URL.
        sha256: path of a file of `urls` -> published hash of its bytes.
        extract: path or glob of an archive -> folder that it is unpacked into. A JSON file that is not packed is put
            there as it is. A glob without a match is a warning of the manifest.
        url_column: column (or column of lists) with image URLs.
        sha256_column: column with the sha256 of the images' bytes.
        instructions: the steps that a person must take.
    """

    kind: Literal["hub", "hub-urls", "archives", "manual", "none"]
    repo: str | None = None
    revision: str | None = None
    include: tuple[str, ...] = ()
    urls: dict[Named, str] = {}
    sha256: dict[Named, Hex] = {}
    extract: dict[Inside, Named] = {}
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

    def joined(self, other: Download) -> Download:
        """The download of everything that either of the two fetches; this one itself if it covers the other.

        Raises:
            ValueError: the two differ in what a folder can have only once, such as the repository or a file's URL.
        """
        merged: dict[str, Any] = {}
        for name in ("urls", "sha256", "extract"):
            mine, others = getattr(self, name), getattr(other, name)
            if double := [key for key in mine if key in others and mine[key] != others[key]]:
                raise ValueError(f"{name} of {double[0]}: {mine[double[0]]} and {others[double[0]]}")
            merged[name] = mine | others
        if self.repo and other.repo and (self.repo, self.revision) != (other.repo, other.revision):
            raise ValueError(f"repositories {self.repo}@{self.revision} and {other.repo}@{other.revision}")
        for name in ("url_column", "sha256_column"):
            values = {getattr(self, name), getattr(other, name)} - {None}
            if len(values) > 1:
                raise ValueError(f"{name}: {' and '.join(sorted(values))}")
            merged[name] = next(iter(values), None)
        merged |= {"repo": self.repo or other.repo, "revision": self.revision if self.repo else other.revision}
        merged["include"] = (*self.include, *(glob for glob in other.include if not _within(glob, self.include)))
        texts = dict.fromkeys(text for text in (self.instructions, other.instructions) if text)
        kinds = {
            "manual": "manual" in {self.kind, other.kind},
            "hub-urls": merged["url_column"] is not None,
            "archives": bool(merged["urls"]),
            "hub": merged["repo"] is not None,
        }
        kind = next((kind for kind, fits in kinds.items() if fits), "none")
        return Download(kind=kind, instructions=" ".join(texts), **merged)  # type: ignore[arg-type]

    def covers(self, other: Download) -> bool:
        """Whether a folder that is filled with this download holds everything that the other one fetches."""
        try:
            return self.joined(other).files() == self.files()
        except ValueError:
            return False

    def files(self) -> dict[str, Any]:
        """The settings that determine the files, without what is for a person."""
        return self.model_dump(mode="json", exclude={"kind", "instructions"})


def _within(glob: str, others: Iterable[str]) -> bool:
    """Whether all paths that match a glob surely match another one, as with "data/val-*" and "data/*"."""
    plain = [other for other in others if not set(other) & set("?[")]  # in these a "*" stands for itself only
    return glob in others or any(fnmatch.fnmatchcase(glob, other) for other in plain)


class Size(Strict):
    """Published size of a dataset; None where it is not published.

    Attributes:
        rows: number of rows.
        gb: gigabytes (1e9 bytes).
    """

    rows: int | None = None
    gb: float | None = None


class Folder(Strict):
    """A raw folder that several rows read: one download read by two converters, or a pool of media files.

    Attributes:
        source: repository, revision and licence.
        size: published size.
        download: how it is downloaded.
        notes: remarks for readers.
    """

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
    """Keep a row if `column <op> value` holds.

    A null is kept by "not_equals", "not_in", "min", "max" and "not_matches", and dropped by every other op.

    Attributes:
        column: name or dotted path of a column.
        op: "min" and "max" are inclusive; "min_length" and "max_length" compare the number of a list's items;
            "not_null" and "not_empty" take no value; "not_matches" drops a text that a regular expression matches as a
            whole.
        value: the operand; a list for "in" and "not_in".
        stages: stages in which the filter applies; empty means all.
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
        """Whether a row is kept whose column has the value `found`."""
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
    """Format of the files that hold a dataset's rows.

    Attributes:
        kind: file format; None derives it from the suffix (.parquet, .arrow, .json, .jsonl, .csv, .tsv). "lines" is
            text with one row per line.
        records: dotted path of the list of rows in a JSON document; "" is the document itself. If the path holds an
            object, its values are the rows. "." makes the document one row.
        key: column that receives a row's key in that object.
        explode: column with a list (or an object) in every row; each item becomes a row. The outer columns are
            repeated, and the item's own column is named "qas.question" for `explode: qas`.
        header: column names of a CSV that has no header line.
        skip: number of lines before the first row or the header.
        names_first: each JSON line is a list, and the first line holds the column names.
        pattern: for kind "lines": regular expression that matches a whole line; its named groups are the columns.
        number: for kind "lines": column that receives the number of the row, as text from "0".
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
    """Drop a row if its `column` has a value that is listed in other files (an exclusion list).

    Attributes:
        column: name or dotted path of a column.
        keep: invert the test: keep the listed rows and drop all others.
        files: glob of the files that hold the list, relative to the raw folder.
        raw: the raw folder of those files, if it is not the row's own.
        table: format of those files.
        values: column of those files that holds the listed values.
        template: converts a listed `{value}` to the form that `column` has.
    """

    column: str
    keep: bool = False
    files: Inside
    raw: FolderName | None = None
    table: TableFormat = TableFormat()
    values: str
    template: str = "{value}"


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


class Skip(Strict):
    """Known bad items of the published data: their rows are left out, and recorded with the source.

    Attributes:
        columns: names or dotted paths of the columns that identify an item.
        rows: the items, each with the values of `columns` in their order; an item of one column needs no list.
        files: glob of files that list further items, relative to the raw folder; "" if there are none.
        table: format of those files.
        values: columns of those files, in the order of `columns`; several columns in place of one give a list, such as
            the start and the end of a span.
        source: who says that the items are bad.
    """

    columns: tuple[str, ...] = pydantic.Field(min_length=1)
    rows: typing.Annotated[tuple[Any, ...], pydantic.BeforeValidator(_frozen)] = ()
    files: typing.Literal[""] | Inside = ""
    table: TableFormat = TableFormat()
    values: tuple[str | tuple[str, ...], ...] = ()
    source: str = pydantic.Field(min_length=1)

    @property
    def items(self) -> tuple[tuple[Any, ...], ...]:
        """The items of `rows`, each as a tuple with a value for each column."""
        return tuple(row if isinstance(row, tuple) else (row,) for row in self.rows)

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.rows and not self.files:
            raise ValueError(f"skip on {', '.join(self.columns)}: give the items in `rows` or `files`")
        if bool(self.files) != bool(self.values):
            raise ValueError("skip: `files` and `values` belong together")
        for item in (*self.items, *([self.values] if self.values else [])):
            if len(item) != len(self.columns):
                raise ValueError(f"skip: {list(item)} does not have one value for each of {', '.join(self.columns)}")
        return self


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else value


class Lookup(Strict):
    """A left join: each row gets the matching row of another table of the raw folder, or null.

    Attributes:
        name: prefix of the joined columns: "NAME.column". If the table is an object of plain values, its values are in
            the column "value".
        files: glob of the table's files.
        table: format of those files.
        key: column of the table to match; if a key occurs twice, its first row counts. None joins by row number.
        column: column of the row that holds the key; if it holds a list, every item is looked up.
    """

    name: str
    files: Inside
    table: TableFormat = TableFormat()
    key: str | None = None
    column: str | None = None

    @pydantic.model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.key is None) != (self.column is None):
            raise ValueError(f"lookup {self.name}: `key` and `column` belong together")
        return self


class Masks(Strict):
    """Segmentation masks stored as image files: the fact `masks` of a row's questions in stage "eval".

    Attributes:
        files: path template of an image file; `{NAME}` is the value of a column. A "*" in the file's name matches the
            frames of a video, sorted by name; a "*" in a folder's name matches any characters.
        objects: column with the ids of the objects. If `files` holds `{object}`, each object has its own files;
            otherwise the id is the pixel value of the object.
        above: threshold: a pixel with a greater value belongs to the mask. Not used if ids are pixel values.
    """

    files: Inside
    objects: str | None = None
    above: int = 0

    @property
    def columns(self) -> set[str]:
        """Columns of the row that the masks need."""
        named = {name for _, name, _, _ in string.Formatter().parse(self.files) if name}
        return (named - {"object"}) | ({self.objects} if self.objects else set())


class BenchmarkSpec(Strict):
    """How the answers to a row's questions are scored in stage "eval": one line of a table of results.

    Attributes:
        name: unique among all benchmarks; None is the name of the row.
        suite: the suite of benchmarks that it belongs to.
        metric: name of the metric of one answer; the score is the mean over the questions.
        corpus: names of metrics of all answers together, reported besides.
        max_new_tokens: maximum length of an answer, in tokens.
        chance: expected score of a blind guess; None if the metric gives it for each question.
        target: the score that a model should reach; None if there is none.
    """

    name: str | None = None
    suite: str
    metric: str
    corpus: tuple[str, ...] = ()
    max_new_tokens: int = pydantic.Field(default=12, gt=0)
    chance: float | None = None
    target: float | None = None


def _share(value: Any) -> Any:
    """A share as a fraction; "2 %" is 0.02."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        return float(value.rstrip().removesuffix("%")) / 100
    return value


class Row(Strict):
    """One dataset of the catalog. Paths are relative to `raw/<folder>/`.

    Attributes:
        name: name of the dataset in mixtures, and of the folder of its shards.
        layout_of: the published dataset with the same file layout, if this row is not that dataset itself.
        raw: the raw folder (another row's, or one of the catalog's `folders`), if it is not the row's own.
        source: repository, revision and licence; written into the index.
        size: published size.
        paper: numbers of the Molmo2 paper: examples, rate_percent; `_with` names the rows that they cover together.
        download: how the row's own raw folder is downloaded.
        stages: stages that use the dataset.
        files: glob of the files of each split; stage "eval" reads "validation", the others "train".
        held_out: share of the rows of "train" that no training stage reads, but stage "eval" does (which the row then
            has without naming it); a fraction or a text such as "2 %". A hash of a row's image, video or `group_by`
            decides, so rows about the same picture stay together, and a row never changes sides when others are added.
        table: format of those files.
        converter: a name in `shards.convert.CONVERTERS`.
        columns: field of the converter -> column of the files; dotted for a field of a struct ("meta.id"). A column
            that only a path template of `media` needs is listed under a name of its own.
        facts: name -> column that a metric reads beside the answer; kept with every question of stage "eval".
        masks: segmentation masks in files; kept as the fact `masks`.
        optional: columns that some of the files lack; their value is null there.
        lookups: tables that are joined to the rows.
        group_by: column by which rows are grouped to one example (one image or video); None: each row is an example.
        skip: known bad items, whose rows are recorded as left out; checked before `filters`.
        filters: conditions that a row must meet; the others are recorded as left out.
        exclude: exclusion lists, such as a benchmark's images.
        options: parameters of the converter; `shards.catalog.converters` has a model of them for each converter.
        loss_weight: stage -> flat weight of a loss token; the length rule applies in every other stage.
        media: path template of a media file, or several that are tried in order; `{value}` is the value of the media
            column, `{value_name}` its last part, `{NAME}` the value of another column, and formats such as
            `{value:012d}` work. A template may hold one "*/" (any folder), and either end with ".*" (any video suffix)
            or hold one "*" in the file's name (any characters). For a video stored as images it names their folder.
        media_from: raw folders that are searched for media after the row's own.
        media_roots: absolute paths of folders outside of the raw data that links, absolute paths and file URLs of media
            may lead to; everything else outside is rejected.
        benchmark: how answers are scored in stage "eval"; a list if the row's questions are scored in several ways.
        metric: the short form of a `benchmark` for `evaluate.py --catalog`: only the name of its metric.
        notes: remarks for readers.
    """

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    layout_of: str | None = None
    raw: FolderName | None = None
    source: dict[str, str] = {}
    size: Size = Size()
    paper: dict[str, Any] = {}
    download: Download | None = None
    stages: tuple[Stage, ...] = pydantic.Field(min_length=1)
    files: dict[Literal["train", "validation"], Inside]
    held_out: typing.Annotated[float, pydantic.BeforeValidator(_share), pydantic.Field(ge=0, lt=1)] = 0.0
    table: TableFormat = TableFormat()
    converter: str
    columns: dict[str, str]
    facts: dict[str, str] = {}
    masks: Masks | None = None
    optional: tuple[str, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    group_by: str | None = None
    skip: tuple[Skip, ...] = ()
    filters: tuple[Filter, ...] = ()
    exclude: tuple[Exclusion, ...] = ()
    options: dict[str, Any] = {}
    loss_weight: dict[Stage, float] = {}
    media: typing.Annotated[tuple[Inside, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    media_from: tuple[FolderName, ...] = ()
    media_roots: typing.Annotated[tuple[str, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    benchmark: typing.Annotated[tuple[BenchmarkSpec, ...], pydantic.BeforeValidator(_as_tuple)] = ()
    metric: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the raw folder."""
        return self.raw or self.name

    @property
    def folders(self) -> tuple[str, ...]:
        """All raw folders that the row reads, its own first."""
        others = [*self.media_from, *(e.raw for e in self.exclude if e.raw)]
        return tuple(dict.fromkeys([self.folder, *others]))

    def split(self, stage: Stage) -> Literal["train", "validation"]:
        """The key of `files` that a stage reads."""
        return "validation" if stage == "eval" and not self.held_out else "train"

    def pattern(self, stage: Stage) -> str:
        """Glob of the files that a stage reads."""
        return self.files[self.split(stage)]

    @property
    def benchmarks(self) -> tuple[BenchmarkSpec, ...]:
        """`benchmark`, and the one that `metric` stands for."""
        if self.metric is None:
            return self.benchmark
        return (*self.benchmark, BenchmarkSpec(suite="own", metric=self.metric, max_new_tokens=OWN_NEW_TOKENS))

    def used_columns(self, stage: Stage) -> list[str]:
        """Every column that the row reads in a stage, sorted; dotted paths are kept as they are."""
        parts: tuple[Filter | Exclusion | Lookup, ...] = (*self.filters, *self.exclude, *self.lookups)
        others = {part.column for part in parts if part.column is not None}
        others |= {column for skip in self.skip for column in skip.columns}
        if stage == "eval":
            others |= {*self.facts.values(), *(self.masks.columns if self.masks else ())}
        return sorted({*self.columns.values(), *others, *([self.group_by] if self.group_by else [])})

    def build_settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that the samples of a stage depend on: no descriptions, and nothing of the other stages."""
        excluded = {"layout_of", "raw", "source", "size", "paper", "download", "stages", "benchmark", "metric", "notes"}
        if stage != "eval":
            excluded |= {"facts", "masks"}
        settings = self.model_dump(mode="json", exclude=excluded, exclude_defaults=True)
        settings["files"] = {self.split(stage): self.pattern(stage)}
        if stage in self.loss_weight:
            settings["loss_weight"] = {stage: self.loss_weight[stage]}
        else:
            settings.pop("loss_weight", None)
        return settings

    @pydantic.field_validator("media_roots")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [path for path in value if not path.startswith("/") or not path.strip("/")]:
            raise ValueError(f"{wrong[0]!r} is not the absolute path of a folder")
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _evaluated_if_held_out(cls, data: Any) -> Any:
        stages = data.get("stages") if isinstance(data, dict) and data.get("held_out") else None
        if isinstance(stages, list | tuple) and "eval" not in stages:
            return {**data, "stages": [*stages, "eval"]}
        return data

    @pydantic.model_validator(mode="after")
    def _splits(self) -> Self:
        if self.held_out and "validation" in self.files:
            raise ValueError("held_out and files.validation are two sources of held-out rows; remove one of them")
        for stage in self.stages:
            if self.split(stage) not in self.files:
                raise ValueError(f"stage {stage} needs files.{self.split(stage)}")
        if self.benchmarks and "eval" not in self.stages:
            stages = ", ".join(self.stages)
            raise ValueError(f'a benchmark needs stage "eval"; the stages are {stages} (`held_out` adds it)')
        return self
