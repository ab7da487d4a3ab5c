"""docs/tour.md: its paths, types, fields and functions are those of the code, and its shapes those of a real batch."""

import dataclasses
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import toy_run

from molmo2.config import load_recipe
from molmo2.parallel.mesh import SINGLE
from molmo2.training.prepare import prepare
from shards.stream.collate import Batch
from shards.stream.loader import make_loader
from shards.stream.plan import Cursor

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
FIVE = [  # as in README.md
    "shards/stream/reader.py",
    "shards/stream/loader.py",
    "molmo2/training/loop.py",
    "molmo2/training/engine.py",
    "molmo2/model/loss.py",
]


def places() -> dict[str, str]:
    """Type -> the path that the page gives for it, as `Type` (`path.py`)."""
    given = re.findall(r"`([A-Z]\w+)`\s+\((?:both )?`([\w/]+\.py)`\)", PAGE)
    pairs = re.findall(r"`([A-Z]\w+)`, `[A-Z]\w+` \(both `([\w/]+\.py)`\)", PAGE)
    for name, path in given + pairs:
        assert dict(given + pairs)[name] == path, f"{name} has two places"
    return dict(given + pairs)


def module(path: str) -> ModuleType:
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


MODULES = {path: module(path) for path in {*FIVE, *places().values()}}  # loaded here, since it takes a second


def tables() -> dict[str, list[tuple[list[str], str]]]:
    """Type -> rows (fields, type) of the table whose first column is headed "field of `Type`"."""
    parts: dict[str, list[tuple[list[str], str]]] = {}
    for name, body in re.findall(r"^\| field of `(\w+)`.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        rows = [line.split("|") for line in body.splitlines()]
        parts[name] = [(re.findall(r"`(\w+)`", row[1]), row[2].strip()) for row in rows]
    return parts


def fields_of(name: str) -> list[str]:
    kind = getattr(MODULES[places()[name]], name)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(kind._fields)


def test_the_five_files_are_the_sections() -> None:
    sections = re.findall(r"^## (\d)\. .*\n\n`([\w/]+\.py)`", PAGE, re.MULTILINE)
    assert sections == [(str(number), path) for number, path in enumerate(FIVE, 1)]
    assert re.findall(r"^ .*\d ([\w/]+\.py)", PAGE, re.MULTILINE) == FIVE
    assert PAGE.count("**The idea:**") == len(FIVE)


def test_every_path_exists() -> None:
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", PAGE)
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_type_is_in_the_module_that_the_page_gives() -> None:
    plain = set(re.findall(r"`([A-Z]\w*[a-z]\w*)[`.]", PAGE)) - {"Tensor"}
    assert plain == set(places())
    assert not [name for name, path in places().items() if not isinstance(getattr(MODULES[path], name, None), type)]


def test_the_tables_list_every_field() -> None:
    assert set(tables()) >= {"Draw", "PackSpec", "MicroSpec", "StoredSample", "Damage", "Batch", "PlacedBatch"}
    for name, rows in tables().items():
        assert sorted(field for fields, _ in rows for field in fields) == sorted(fields_of(name)), name


def test_every_function_is_in_a_file_of_the_tour() -> None:
    named = re.findall(r"`(?:(\w+)\.)?(\w+)\(\)`", PAGE)
    assert len(named) >= 8
    for owner, name in named:
        holders = [getattr(source, owner, None) for source in MODULES.values()] if owner else list(MODULES.values())
        assert any(callable(getattr(holder, name, None)) for holder in holders), f"{owner}.{name}"


def test_the_shapes_are_those_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_run.build_toy(tmp_path)
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    run = prepare(load_recipe(toy_run.write_recipe(tmp_path / "r.yaml", "r")), SINGLE, torch.device("cpu"))
    batch: Batch = next(make_loader(run.plan, Cursor(), run.layout, micro_batch=2))
    tensors, sizes = batch.tensors(), {"3": 3, "crop": run.layout.crop_size}
    for fields, kind in tables()["Batch"]:
        shaped = re.fullmatch(r"(\w+) \[([\w, ]+)\]", kind)
        assert (shaped is not None) == (fields[0] in tensors), fields
        if shaped is None:
            continue
        for tensor in (tensors[field] for field in fields):
            assert str(tensor.dtype) == f"torch.{shaped[1]}"
            letters = shaped[2].split(", ")
            assert tensor.shape == tuple(sizes.setdefault(*pair) for pair in zip(letters, tensor.shape, strict=True))
    assert sizes["B"] == 2 and sizes["S"] == 256 and sizes["N"] and sizes["T"] and sizes["U"]
