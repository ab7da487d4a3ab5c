"""From a user's files and folders to catalog rows: links in a raw folder, tables with their splits, places of media."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shards.atomic import write_atomic
from shards.catalog import Row, TableFormat
from shards.convert.layout_columns import IMAGE_SUFFIXES, Answers, Layout, split_and_stem, values_of
from shards.convert.reading import open_rows, stage_groups
from shards.convert.recognise import coco, numbered_classes, recognise_folder, recognise_rows
from shards.sources.class_names import class_names
from shards.sources.content import COMPRESSED_SUFFIXES
from shards.sources.parquet import SourceError
from shards.sources.paths import is_system_file
from shards.sources.tables import SUFFIXES, open_table

MADE = "made"  # folder of the tables that are written for a layout without one
SEEN = 200  # rows of a table by which its layout is recognised
PROBED = 20  # media values by which the folder of the media is found
HELD_OUT = (0.02, 0.05, 0.1, 0.2, 0.4)  # the first share that holds out any group is taken
# converter -> the metric of its answers
METRICS = {"image_choice": "multiple_choice", "image_qa": "exact_match", "video_qa": "exact_match"}
NO_TABLES = {"dataset_info.json", "dataset_infos.json", "state.json"}  # descriptions that Hugging Face adds
LARGEST_DOCUMENT = 1 << 30  # bytes of a JSON file that is looked into for an object with a list of rows


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRow:
    """A dataset that was found: its layout, its catalog row as plain data, and the numbers of its examples."""

    layout: Layout
    row: dict[str, Any]
    num_train: int
    num_held_out: int


class Found(NamedTuple):
    """The datasets that were found, and the tables that are not used because their layout is not known, in words."""

    rows: list[OwnRow]
    unknown: list[str]


class OwnTable(NamedTuple):
    """What a table holds: its layout, if it is known, and the keys of a catalog row about its format."""

    layout: Layout | None
    form: dict[str, Any]


def link_inputs(paths: Sequence[Path], folder: Path) -> list[str]:
    """Link the folders of `paths` into a raw folder; return the names of the paths in it ("" is the folder itself).

    Raises:
        ValueError: a path does not exist, or another folder has its name there.
    """
    names = []
    for path in paths:
        path = path.expanduser().resolve()
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        source = path if path.is_dir() else path.parent
        if folder.resolve().is_relative_to(source) and source != folder.resolve():
            raise ValueError(f"{source} contains the raw folder {folder}; name the folders with your data in it")
        if source.is_relative_to(folder.resolve()):
            names.append("" if path == folder.resolve() else path.relative_to(folder.resolve()).as_posix())
            continue
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / source.name
        if link.is_symlink() and link.resolve() != source:
            link.unlink()
        if not link.exists():
            link.symlink_to(source, target_is_directory=True)
        if link.resolve() != source:
            raise ValueError(f"{link} exists and is not {source}; give another --name")
        names.append(source.name if path.is_dir() else f"{source.name}/{path.name}")
    return names


def find_rows(name: str, folder: Path, inputs: Sequence[str], answers: Answers) -> Found:
    """Recognise what the inputs hold.

    Args:
        name: name of the dataset; several tables get its name and their own.
        folder: the raw folder.
        inputs: paths in it, as `link_inputs` returns them.
        answers: what the data do not show.

    Raises:
        UnsureError: something must be answered first.
        ValueError: nothing was recognised, or the media are not found.
    """
    files = sorted({file for given in inputs for file in _files(folder, given)})
    tables: dict[str, dict[str, str]] = {}
    for file in filter(_is_table, files):
        split, stem = split_and_stem(file)
        tables.setdefault(stem, {}).setdefault(split, re.sub(r"-\d{5}-of-\d{5}", "-*", file))
    roots = sorted({str((folder / given.split("/")[0]).resolve()) for given in inputs if given})
    base = {"raw": folder.name, "stages": ["sft"]} | ({"media_roots": roots} if roots else {})
    if tables:
        found = _of_tables(name, folder, inputs, tables, base, answers)
    else:
        found = Found(_of_folder(name, folder, files, base), [])
    if not found.rows:
        pictures = sum(file.lower().endswith(IMAGE_SUFFIXES) for file in files)
        table = next((splits.get("train", splits.get("validation", "")) for splits in tables.values()), "")
        what = _columns_text(folder, table) if table else f"{pictures} pictures"
        raise ValueError(
            f"{', '.join(inputs) or folder}: no known layout ({len(files)} files; {what}). Known: conversations; an "
            "image or a video with question and answer, with options, a caption, a class, or points and a label; "
            "instructions (Alpaca); COCO; pictures beside .txt files; a folder for each class. Anything else needs a "
            "catalog row that is written by hand: docs/own-data.md"
        )
    return found


def _of_tables(
    name: str,
    folder: Path,
    inputs: Sequence[str],
    tables: dict[str, dict[str, str]],
    base: dict[str, Any],
    answers: Answers,
) -> Found:
    found = Found([], [])
    for stem, splits in tables.items():
        if "train" not in splits:
            splits = {"train": splits["validation"]}
        layouts = {split: _table_layout(folder, file, answers) for split, file in splits.items()}
        found.unknown.extend(_columns_text(folder, splits[split]) for split, side in layouts.items() if not side.layout)
        if (layout := layouts["train"].layout) is None:
            continue
        splits = {split: file for split, file in splits.items() if layouts[split].layout is not None}
        keys = {**base, **layout.keys, **layouts["train"].form, "files": splits}
        if (place := _media_base(folder, inputs, splits["train"], layouts["train"])) is not None:
            keys["media"] = f"{place}{{value}}"
        own = name if len(tables) == 1 else f"{name}-{slug(PurePosixPath(stem).name.partition('.')[0])}".strip("-")
        if layout.rows:
            made = {split: side.layout.rows for split, side in layouts.items() if side.layout is not None}
            keys["files"] = {split: _write(folder, f"{own}-{split}", rows) for split, rows in made.items()}
            keys.pop("table", None)
        if layout.classes:
            keys["lookups"] = [{**layout.keys["lookups"][0], "files": _write(folder, f"{own}-classes", layout.classes)}]
        found.rows.append(_own_row(own, folder, layout, keys))
    return found


def _of_folder(name: str, folder: Path, files: Sequence[str], base: dict[str, Any]) -> list[OwnRow]:
    layout = recognise_folder(files, lambda file: (folder / file).read_text("utf-8"))
    if layout is None:
        return []
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in layout.rows:
        split, _ = split_and_stem(PurePosixPath(row["image"]).parent.as_posix())
        sides.setdefault(split, []).append(row)
    if "train" not in sides:
        sides = {"train": layout.rows}
    splits = {split: _write(folder, f"{name}-{split}", rows) for split, rows in sides.items()}
    return [_own_row(name, folder, layout, {**base, **layout.keys, "files": splits})]


def _files(folder: Path, given: str) -> Iterator[str]:
    """Names of the files of an input, relative to the raw folder; hidden files and our own tables are left out."""
    start = folder / given
    if start.is_file():
        yield given
        return
    for place, folders, names in os.walk(start, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != MADE)
        for name in names:
            path = Path(place, name).relative_to(folder)
            if not name.startswith(".") and not is_system_file(path):
                yield path.as_posix()


def _is_table(file: str) -> bool:
    path = PurePosixPath(file)
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return path.suffix.lower() in SUFFIXES and path.name not in NO_TABLES


def _table_layout(folder: Path, pattern: str, answers: Answers) -> OwnTable:
    form: dict[str, Any] = {}
    document = _document(folder / pattern)
    if document is not None:
        if (layout := coco(document)) is not None:
            return OwnTable(layout, {})
        lists = [key for key, value in document.items() if isinstance(value, list) and value]
        form = {"table": {"records": lists[0]}} if len(lists) == 1 else {}
    table = open_table(folder, pattern, (), TableFormat(**form.get("table", {})))
    found = recognise_rows(table.first(SEEN), answers)
    if found is None:
        try:
            found = numbered_classes(table.first(SEEN), class_names(table.files[0]))
        except ValueError as error:
            raise ValueError(f"{pattern}: {error}") from None
    if found is not None and found.rows:  # they are written as a table, so all of them are needed
        found = recognise_rows(table.first(len(table)), answers)
    return OwnTable(found, form)


def _document(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is another file, or has a list or lines of JSON."""
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > LARGEST_DOCUMENT:
        return None
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] != b"{":
            return None
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _columns_text(folder: Path, pattern: str) -> str:
    names = dict.fromkeys(name for row in open_table(folder, pattern, ()).first(SEEN) for name in row)
    return f"columns of {pattern}: {', '.join(names)}"


def _media_base(folder: Path, inputs: Sequence[str], table: str, own_table: OwnTable) -> str | None:
    """The folder that the paths of a table are relative to, "" or ending with "/"; None if there are no such paths.

    Raises:
        ValueError: the files are in none of the given folders.
    """
    layout = own_table.layout
    assert layout is not None
    form = TableFormat(**own_table.form.get("table", {}))
    rows = layout.rows or open_table(folder, table, (), form).first(SEEN)
    values = [value for value in _paths(rows, layout) if not value.startswith("/")][:PROBED]
    if not values:
        return None
    own = PurePosixPath(table).parent
    parents = [own, *own.parents]
    below = [PurePosixPath(given) for given in inputs if (folder / given).is_dir()]
    deeper = [
        PurePosixPath(path.relative_to(folder).as_posix())
        for parent in dict.fromkeys([own, *below])
        for path in sorted((folder / parent).iterdir())
        if path.is_dir()
    ]
    places = ["" if str(place) == "." else f"{place}/" for place in dict.fromkeys([*parents, *below, *deeper])]
    present = {place: sum((folder / place / value).exists() for value in values) for place in places}
    best = max(places, key=lambda place: present[place])
    if not present[best]:
        raise ValueError(
            f"{table}: {values[0]!r} is in none of {', '.join(place or folder.name for place in places[:6])}; "
            "give the folder of the media as another PATH"
        )
    return best


def _paths(rows: Sequence[Any], layout: Layout) -> list[str]:
    """The media of rows that are paths, not URLs or bytes."""
    if layout.media_column is not None:
        values = values_of(rows, layout.media_column)
    else:
        messages = values_of(rows, layout.keys["columns"]["messages"])
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        parts = [part for content in contents for part in content if isinstance(part, dict)]
        names = ("image", "image_url", "video", "video_url", "url", "path")
        values = [part[name] for part in parts for name in names if part.get(name)]
    texts = [value.get("path") or value.get("url") if isinstance(value, dict) else value for value in values]
    embedded = [isinstance(value, dict) and bool(value.get("bytes")) for value in values]
    paths = [text for text, bytes_too in zip(texts, embedded, strict=True) if isinstance(text, str) and not bytes_too]
    return [path for path in paths if "://" not in path and not path.startswith("data:")]


def _write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write a table into the raw folder; its name there."""
    (folder / MADE).mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(folder / MADE / f"{name}.jsonl", lines)
    return f"{MADE}/{name}.jsonl"


def _own_row(name: str, folder: Path, layout: Layout, keys: dict[str, Any]) -> OwnRow:
    """Complete a row: its held-out rows and its metric."""
    metric = {"metric": METRICS[keys["converter"]]} if keys["converter"] in METRICS else {}
    if keys["converter"] == "video_qa" and "options" in keys["columns"]:
        metric = {"metric": "multiple_choice"}
    base = {"name": name, **keys}
    if "validation" in keys["files"]:
        sides = [base | metric | {"stages": ["sft", "eval"]}]
    else:
        sides = [base | metric | {"held_out": share} for share in HELD_OUT]
    for side in [*sides, base]:
        row = Row.model_validate(side)
        try:
            train = len(stage_groups(row, "sft", open_rows(row, "sft", folder)))
            held_out = len(stage_groups(row, "eval", open_rows(row, "eval", folder))) if side is not base else 0
        except SourceError:
            if side is base:
                raise
            continue
        break
    held = {"held_out": f"{row.held_out:.0%}".replace("%", " %")} if row.held_out else {}
    return OwnRow(layout=layout, row=side | held, num_train=train, num_held_out=held_out)


def slug(text: str) -> str:
    """A name for a dataset, from the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
