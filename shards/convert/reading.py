"""From a catalog row to groups of rows, and from a group to examples: skips, filters, exclusions, the converter."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards.catalog import Exclusion, Row, Stage
from shards.catalog.converters import CONVERTER_OPTIONS
from shards.convert import CONVERTERS
from shards.convert.common import Group, Omitted
from shards.convert.marks import without_marks
from shards.convert.masks import masks_of, packed
from shards.convert.skips import skip_reason, skipped_items
from shards.schema import Example, MissingMediaError, RejectedError, as_reject
from shards.sources.joined import open_joined
from shards.sources.json_text import DuplicateKey
from shards.sources.media_files import MediaFiles
from shards.sources.parquet import MissingSourceError, SourceError
from shards.sources.paths import at
from shards.sources.tables import Table, open_table

IDENTITY = ("image", "image_1", "images", "video", "messages", "question")  # fields that identify a row, in this order
READ_BYTES = 256 << 20  # bytes of rows that a shard's build holds in memory at a time, unless one row is larger


def open_rows(row: Row, stage: Stage, raw: Path) -> Table:
    """Open the files of a dataset's split as a table.

    Args:
        row: the dataset.
        stage: the stage; it selects the split.
        raw: the dataset's raw folder; its parent holds the other raw folders.

    Raises:
        MissingSourceError: files or a folder of media are missing.
        SourceError: a file is unreadable or lacks a column.
    """
    for name in row.folders:
        folder = raw if name == row.folder else raw.parent / name
        if not folder.is_dir():
            raise MissingSourceError(f"{row.name}: {folder}: no such folder")
    try:
        columns = set(row.used_columns(stage))
        own = {name for name in columns if name.partition(".")[0] not in {lookup.name for lookup in row.lookups}}
        table = open_table(raw, row.pattern(stage), own - set(row.optional), row.table)
        table = open_joined(table, raw, row.lookups, columns)
        for skip in row.skip:
            skipped_items(skip, raw)
        for exclusion in row.exclude:
            _excluded_values(raw.parent / (exclusion.raw or raw.name), exclusion.model_dump_json())
    except MissingSourceError as error:
        raise MissingSourceError(f"{row.name}: {error}") from None
    except SourceError as error:
        raise SourceError(f"{row.name}: {error}") from None
    return table


def stage_groups(row: Row, stage: Stage, table: Table) -> list[tuple[int, ...]]:
    """The row numbers of each group that a stage reads: all groups, or those on its side of `held_out`.

    Raises:
        SourceError: `held_out` leaves a side without groups.
    """
    groups = table.groups(row.group_by)
    if not row.held_out:
        return groups
    is_held_out = held_out_rows(row, table)
    mine = [group for group in groups if is_held_out[group[0]] == (stage == "eval")]
    if groups and not mine:
        side = "no group of rows is held out" if stage == "eval" else "every group of rows is held out"
        raise SourceError(
            f"{row.name}: {side}: held_out is {row.held_out:.3g} of {len(groups)} groups; give another share, or a "
            "file of its own with `files: {validation: ...}` and stage eval"
        )
    return mine


def held_out_rows(row: Row, table: Table) -> npt.NDArray[np.bool_]:
    """Whether each row of a table is held out: a hash of what identifies it is below the share `held_out`.

    The column `group_by` identifies a row, or else the first of `IDENTITY` that has a value; the hash is the same in
    all datasets, so the same picture is on the same side in each. Embedded media are not read: there the number of the
    row decides.
    """
    columns = [row.group_by] if row.group_by else [row.columns[field] for field in IDENTITY if field in row.columns]
    numbers, size = range(len(table)), 1024
    if columns and len(table):
        ((_, first),) = table.read([0], columns)
        columns = [] if any(_holds_bytes(at(first, column)) for column in columns) else columns
    held_out = np.zeros(len(table), np.bool_)
    for start in range(0, len(table), size):
        some = numbers[start : start + size]
        rows = [values for _, values in table.read(some, columns)] if columns else [{} for _ in some]
        for number, values in zip(some, rows, strict=True):
            given = [value for column in columns if (value := at(values, column)) not in (None, "", [])]
            identity = given[0] if given else number
            text = identity if isinstance(identity, str) else repr(identity)
            digest = xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))
            held_out[number] = digest < row.held_out * 2**64
    return held_out


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def read_groups(
    row: Row,
    stage: Stage,
    raw: Path,
    table: Table,
    groups: Sequence[Sequence[int]],
    used: set[Path] | None = None,
    num_variants: int = 1,
) -> Iterator[Group]:
    """Yield the groups with these row numbers.

    Args:
        row: the dataset.
        stage: the stage.
        raw: as in `open_rows`.
        table: as `open_rows` returns it.
        groups: the row numbers of each group.
        used: a set that receives the media files that the rows name.
        num_variants: number of text variants for which converters draw.
    """
    columns = row.used_columns(stage)
    others = tuple(raw.parent / name for name in row.media_from)
    outside = tuple(map(Path, row.media_roots))
    media = MediaFiles(
        root=raw, templates=row.media, others=others, outside=outside, used=set() if used is None else used
    )
    most = max(1, READ_BYTES // max(table.row_bytes(columns), 1))
    for some in _runs(groups, most):
        rows = iter(table.read([number for numbers in some for number in numbers], columns))
        for numbers in some:
            sources, values = zip(*(next(rows) for _ in numbers), strict=True)
            key = f"{row.name}-{numbers[0]:08d}"
            yield Group(
                row=row,
                stage=stage,
                media=media,
                key=key,
                sources=sources,
                values=values,
                num_variants=num_variants,
            )


def _runs(groups: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Groups in order, in runs of at most `most` rows; a larger group is a run of its own."""
    run: list[Sequence[int]] = []
    for numbers in groups:
        if run and sum(map(len, run)) + len(numbers) > most:
            yield run
            run = []
        run.append(numbers)
    if run:
        yield run


def convert(group: Group) -> Iterator[Example | Omitted]:
    """Convert a group: yields an `Omitted` for each row that is left out, then the converter's results.

    A row is left out by the catalog, or because a value cannot be used (see `_cleaned`).

    Raises:
        RejectedError: by the converter; or the row of an annotation's facts is ambiguous.
    """
    remaining = []
    faults: list[list[str]] = [[] for _ in group.values]
    cleaned = tuple(_cleaned(values, "", own) for values, own in zip(group.values, faults, strict=True))
    group = replace(group, values=cleaned)
    for index in range(len(group.values)):
        if reason := _left_out(group, index):
            yield group.omit(reason, index)
        elif faults[index]:
            yield group.reject(faults[index][0], index)
        else:
            remaining.append(index)
    if remaining:
        group = group.part(remaining)
        name = group.row.converter
        options = CONVERTER_OPTIONS[name].model_validate(group.row.options)
        for result in CONVERTERS[name](group, options):
            yield with_facts(group, without_marks(result)) if isinstance(result, Example) else result


def convert_or_reject(group: Group) -> list[Example | Omitted]:
    """Convert a group; an exception becomes the reject of the row that causes it, and the other rows are used.

    Raises:
        OSError: an error of the machine, see `as_reject`.
    """
    items, error = _try(group)
    if error is None:
        return items
    rows = range(len(group.values))
    alone = [_try(group.part([index]))[1] for index in rows] if len(rows) > 1 else [error]
    faulty = {index: reject for index, reject in enumerate(alone) if reject is not None}
    if not 0 < len(faulty) < len(rows):  # the fault is in what all rows share, such as the image
        record = _left_out_by(error, group)
        causes = [item for item in items if isinstance(item, Omitted) and item.source == record.source]
        if len(rows) == 1 and causes:  # a row without any usable item is recorded once
            items = [item for item in items if item not in causes]
            record = replace(record, reason=f"{record.reason}: {causes[0].reason}")
        return [*items, record]
    rest = group.part([index for index in rows if index not in faulty])
    return [*(_left_out_by(reject, group, index) for index, reject in faulty.items()), *convert_or_reject(rest)]


def _left_out_by(error: RejectedError, group: Group, index: int = 0) -> Omitted:
    """The record of a row that an error leaves out; media that a download has on record as failed are no fault."""
    return (group.omit if isinstance(error, MissingMediaError) else group.reject)(str(error), index)


def _try(group: Group) -> tuple[list[Example | Omitted], RejectedError | None]:
    """What `convert` yields for a group, and the error that ended it."""
    items: list[Example | Omitted] = []
    try:
        items.extend(convert(group))  # what came before an error stays
    except Exception as error:
        return items, as_reject(error, f"{group.row.converter} failed on the row's values")
    return items, None


def _cleaned(value: Any, column: str, faults: list[str]) -> Any:
    """A row's value with None for NaN, which tables have for a missing value; adds what cannot be used to `faults`.

    A text with half a surrogate pair, as from a JSON escape that was cut, has no encoding. A key that occurs twice in
    an object has no single value.
    """
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            faults.append(f"column {column}: the text cannot be encoded as UTF-8: {error}")
    elif isinstance(value, dict):
        _cleaned("".join(map(str, value)), column, faults)
        return {key: _cleaned(item, f"{column}.{key}" if column else str(key), faults) for key, item in value.items()}
    elif isinstance(value, list):
        return [_cleaned(item, column, faults) for item in value]
    elif isinstance(value, DuplicateKey):
        faults.append(f"column {column}: key {value.key!r} occurs several times in one object, with different values")
    return value


def with_facts(group: Group, example: Example) -> Example:
    """In stage "eval", add the facts of its row to every annotation; the group has one row, or one per annotation.

    Raises:
        RejectedError: the group has another number of rows.
    """
    row, rows, annotations = group.row, group.values, example.annotations
    if group.stage != "eval" or not (row.facts or row.masks):
        return example
    if len(rows) not in {1, len(annotations)}:
        raise RejectedError(
            f"{len(rows)} rows made {len(annotations)} annotations: whose are the facts {', '.join(row.facts)}? "
            "Leave `group_by` out of the catalog row"
        )
    facts = [_facts_of(group, index) for index in range(len(rows))]
    pairs = zip(annotations, facts * len(annotations) if len(rows) == 1 else facts, strict=True)
    return replace(example, annotations=tuple(replace(annotation, facts=own) for annotation, own in pairs))


def _facts_of(group: Group, index: int) -> dict[str, Any]:
    row, values = group.row, group.values[index]
    facts = {name: packed(at(values, column)) for name, column in row.facts.items()}
    if row.masks is not None:
        facts["masks"] = masks_of(row.masks, group.media.root, values)
    if "masks" in facts and (not facts["masks"] or None in facts["masks"]):
        raise RejectedError(f"media: row {group.sources[index].row} has an object without a mask")
    return facts


def _left_out(group: Group, index: int) -> str:
    """The reason why the catalog leaves out a row of a group; "" if it does not."""
    values = group.values[index]
    if reason := skip_reason(group.row, group.media.root, values):
        return reason
    for f in group.row.filters:
        value = at(values, f.column)
        if (not f.stages or group.stage in f.stages) and not f.keeps(value):
            condition = f.op if f.value is None else f"{f.op} {f.value}"
            return f"filter: {f.column} is {str(value)[:60]!r}, wanted {condition}"
    for exclusion in group.row.exclude:
        folder = group.media.root.parent / (exclusion.raw or group.media.root.name)
        listed = at(values, exclusion.column) in _excluded_values(folder, exclusion.model_dump_json())
        if listed != exclusion.keep:
            where = f"{exclusion.raw or group.row.folder}/{exclusion.files}"
            return f"excluded: {exclusion.column} is {'' if listed else 'not '}listed in {where}"
    return ""


@functools.lru_cache(maxsize=4)
def _excluded_values(folder: Path, exclusion_json: str) -> frozenset[str]:
    """The values that the files of an exclusion list; the exclusion is passed as JSON to be hashable."""
    exclusion = Exclusion.model_validate_json(exclusion_json)
    table = open_table(folder, exclusion.files, [exclusion.values], exclusion.table)
    rows = table.read(range(len(table)), [exclusion.values])
    return frozenset(exclusion.template.format(value=at(values, exclusion.values)) for _, values in rows)
