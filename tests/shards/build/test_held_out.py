"""Rows that are held out: the same ones whatever else the table has, and splits and appended rows that keep shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_cases import QUESTIONS, factory, tree

from shards.build.builder import Built, build_dataset
from shards.catalog import CatalogError, Row, Stage, load_catalog
from shards.convert.reading import held_out_rows, open_rows, stage_groups
from shards.sources.parquet import SourceError


def write(folder: Path, numbers: range, pictures: int = 8) -> Path:
    """Rows about `pictures` images, in turns; images that are there stay as they are."""
    folder.mkdir(exist_ok=True)
    for number in range(0 if (folder / "0.png").exists() else pictures):
        PIL.Image.new("RGB", (40 + number, 30), "red").save(folder / f"{number}.png")
    rows = [{"image": f"{n % pictures}.png", "question": f"What is {n}?", "answer": f"It is {n}."} for n in numbers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def built(raw: Path, folder: Path, out: Path, stage: Stage = "sft", **changes: Any) -> Built:
    """Build a row in shards of four examples."""
    row = Row.model_validate({**QUESTIONS, **changes})
    settings = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1, "examples_per_shard": 4})
    return build_dataset(row, stage, settings, factory(raw, stage, 1), raw=folder, out=out)


def rows_of(out: Path) -> set[int]:
    """The rows that samples were made of."""
    sources = set()
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            records = [member for member in tar if member.name.endswith(".json")]
            sources |= {json.load(tar.extractfile(member))["source"]["row"] for member in records}  # type: ignore[arg-type]
    return sources


def test_a_share_is_a_fraction_or_a_percentage() -> None:
    assert Row.model_validate(QUESTIONS | {"held_out": "2 %"}).held_out == pytest.approx(0.02)
    row = Row.model_validate(QUESTIONS | {"held_out": 0.25, "metric": "exact_match"})
    assert (row.held_out, row.stages) == (0.25, ("sft", "eval"))
    assert [(spec.metric, spec.name) for spec in row.benchmarks] == [("exact_match", None)]
    for wrong in ({"held_out": 1}, {"held_out": "-1%"}, {"held_out": "some"}, {"metric": "exact_match"}):
        with pytest.raises(ValueError, match=r"held_out|needs stage"):
            Row.model_validate(QUESTIONS | wrong)
    with pytest.raises(ValueError, match="two sources of held-out rows"):
        Row.model_validate(QUESTIONS | {"held_out": 0.1, "files": {"train": "a", "validation": "b"}})


def test_a_catalog_with_held_out_rows_has_stage_eval(tmp_path: Path) -> None:
    text = "preset: tiny\ntokenizer: tokenizer\nstages: {sft: {num_variants: 4, examples_per_shard: 7, limits: %s}}\n"
    row = json.dumps(QUESTIONS | {"raw": "mine", "held_out": "2%"})
    (tmp_path / "mine.yaml").write_text(
        text % "{sequence_length: 99, max_crops: 4}" + f"rows: [{row}]\nfolders: {{mine: {{download: {{kind: none}}}}}}"
    )
    catalog = load_catalog(str(tmp_path / "mine.yaml"))
    assert [row.name for row in catalog.require("eval")] == ["mine"]
    assert catalog.stages["eval"].num_variants == 1 and catalog.stages["eval"].limits == catalog.stages["sft"].limits
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace('"2%"', "0"))
    with pytest.raises(CatalogError, match="stage eval"):
        load_catalog(str(tmp_path / "mine.yaml")).require("eval")


def test_rows_about_one_picture_are_on_one_side_in_every_dataset(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", range(400), pictures=100)
    row = Row.model_validate(QUESTIONS | {"held_out": 0.2})
    table = open_rows(row, "sft", folder)
    held_out = held_out_rows(row, table)
    assert 0.1 < held_out.mean() < 0.4
    assert (held_out.reshape(4, 100) == held_out[:100]).all()
    train, test = (stage_groups(row, stage, table) for stage in ("sft", "eval"))
    assert sorted(train + test) == [(n,) for n in range(400)]
    points = Row.model_validate(
        QUESTIONS
        | {"name": "points", "held_out": 0.2, "group_by": "image", "converter": "image_points"}
        | {"columns": {"image": "image", "label": "answer"}}
        | {"options": {"scale": "percent", "styles": ["pointing"], "max_points": 9}}
    )
    grouped = stage_groups(points, "eval", open_rows(points, "eval", folder))
    assert sorted(n for group in grouped for n in group) == [n for (n,) in test]
    write(folder, range(600), pictures=100)
    assert (held_out_rows(row, open_rows(row, "sft", folder))[:400] == held_out).all()


def test_embedded_pictures_are_held_out_by_the_number_of_their_row(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"1", "path": None}] * 50, "question": ["a"] * 50, "answer": ["b"] * 50})
    pq.write_table(table, tmp_path / "rows.parquet")
    row = Row.model_validate(QUESTIONS | {"held_out": 0.3, "files": {"train": "rows.parquet"}})
    held_out = held_out_rows(row, open_rows(row, "sft", tmp_path))
    assert 5 < held_out.sum() < 25
    none = row.model_copy(update={"held_out": 1e-9})
    with pytest.raises(SourceError, match=r"no group of rows is held out: held_out is 1e-09 of 50 .* another share"):
        stage_groups(none, "eval", open_rows(none, "eval", tmp_path))


def test_training_leaves_out_what_evaluation_reads(raw: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", range(24))
    for stage in ("sft", "eval"):
        built(raw, folder, tmp_path / stage, stage, held_out=0.4)
    train, test = rows_of(tmp_path / "sft"), rows_of(tmp_path / "eval")
    assert test and train and not train & test and len(train | test) == 24


def test_a_change_of_one_split_keeps_the_shards_of_the_other(raw: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", range(8))
    (folder / "val.jsonl").write_text((folder / "rows.jsonl").read_text())
    built(raw, folder, tmp_path / "sft")
    before = tree(tmp_path / "sft")
    both = {"stages": ["sft", "eval", "long"], "files": {"train": "rows.jsonl", "validation": "val.jsonl"}}
    later = built(
        raw, folder, tmp_path / "sft", **both, facts={"answers": "answer"}, metric="anls", loss_weight={"long": 1}
    )
    assert (later.num_made, later.num_kept) == (0, 2)
    assert tree(tmp_path / "sft") == before
    built(raw, folder, tmp_path / "eval", "eval", **both)
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace("It is", "This is"))
    assert built(raw, folder, tmp_path / "eval", "eval", **both, loss_weight={"sft": 1}).num_made == 0
    assert built(raw, folder, tmp_path / "sft", **both).num_made == 2


def test_appended_rows_make_new_shards_and_keep_the_old_ones(raw: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", range(10))
    built(raw, folder, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    write(folder, range(15))
    later = built(raw, folder, tmp_path / "out")
    assert (later.num_made, later.num_kept) == (2, 2)  # the third shard had room for two more
    kept = [name for name, time in times.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time]
    assert sorted(kept) == ["000000.tar", "000001.tar"]
    built(raw, folder, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert built(raw, folder, tmp_path / "out").num_made == 0


def test_removed_and_changed_rows_leave_no_shard_behind(raw: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", range(14))
    built(raw, folder, tmp_path / "out")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace("It is", "It was")
    (folder / "rows.jsonl").write_text("\n".join(lines[:8]))
    later = built(raw, folder, tmp_path / "out")
    assert (later.num_made, later.num_kept) == (1, 1)
    built(raw, folder, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
