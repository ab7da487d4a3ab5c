"""The report of a build counts peculiar pictures and answers, which are used all the same."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from build_cases import QUESTIONS, factory
from fork_server import python

from molmo2.inspection.facts import facts_of
from molmo2.inspection.samples import thumbnails
from shards.build.builder import build_dataset
from shards.build.oddities import DUPLICATE, EDGE, LONG, SHARED, merge_oddities
from shards.catalog import Row, load_catalog
from shards.media.images import DEEP, FLAT, TINY, TRANSPARENT, TURNED, load_image, load_with_notes
from shards.schema import ImageRef
from shards.stream.dataset import open_dataset
from shards.stream.fill import expected_fill
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, PlanSettings, open_plan
from tools.build_shards import count_shared_questions, write_report_json

ROOT = Path(__file__).resolve().parents[3]
NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def encoded(image: PIL.Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures() -> dict[str, tuple[bytes, set[str]]]:
    """Name -> bytes of a file, and what is noted about it."""
    noise = PIL.Image.fromarray(NOISE)
    opaque, clear = noise.convert("RGBA"), noise.convert("RGBA")
    clear.putpixel((3, 3), (0, 0, 0, 7))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    deep = PIL.Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)
    return {
        "plain": (encoded(noise), set()),
        "opaque": (encoded(opaque), set()),
        "clear": (encoded(clear), {TRANSPARENT}),
        "turned": (encoded(noise, "JPEG", exif=turned), {TURNED}),
        "deep": (encoded(deep), {DEEP}),
        "flat": (encoded(PIL.Image.new("RGB", (60, 40), "red")), {FLAT}),
        "tiny": (encoded(noise.crop((0, 0, 60, 31))), {TINY}),
        "bitmap": (encoded(noise.resize((160, 160)), "BMP"), set()),
    }


@pytest.mark.parametrize("name", pictures())
def test_what_is_noted_about_a_picture(name: str) -> None:
    data, kinds = pictures()[name]
    pixels, notes = load_with_notes(ImageRef(data=data))
    assert set(notes.kinds) == kinds
    assert (pixels == load_image(ImageRef(data=data))).all()


def test_a_build_counts_each_file_once_and_finds_equal_pixels_in_other_shards(raw: Path, tmp_path: Path) -> None:
    files = pictures()
    for name, (data, _) in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "copy.png").write_bytes(encoded(PIL.Image.fromarray(NOISE), compress_level=0))
    names = [*files, "flat", "copy"]  # a file of two rows is one file; "opaque" and "copy" have the pixels of "plain"
    rows = [{"image": f"{name}.png", "question": "What?", "answer": "This."} for name in names]
    rows[1]["answer"] = "no " * 1100
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = Row.model_validate(QUESTIONS)
    stage = load_catalog("demo").stages["long"].model_copy(update={"num_variants": 1, "examples_per_shard": 3})
    build = [
        build_dataset(row, "long", stage, factory(raw, "long", 1), raw=tmp_path, out=tmp_path / "out") for _ in range(2)
    ]
    assert build[0].oddities == build[1].oddities  # the second run reads the parts of the first
    assert {kind: entry["number"] for kind, entry in build[0].oddities.items()} == {
        **dict.fromkeys((TRANSPARENT, TURNED, DEEP, FLAT, TINY, LONG), 1),
        DUPLICATE: 2,
    }
    assert build[0].oddities[FLAT]["shown"] == [(5, 0)]
    assert build[0].oddities[DUPLICATE]["shown"] == [
        (0, 0),
        (1, 0),
        (0, 0),
        (9, 0),
    ]  # with those that they are equal to
    dataset = open_dataset(str(tmp_path), "out")
    red, *others = thumbnails(dataset, [(5, 0), (5, 1)])  # there is no second picture
    assert (red.caption, others) == ("mine-00000005", [])
    pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(red.uri.partition(",")[2]))))
    assert (abs(pixels.astype(int) - [255, 0, 0]) < 8).all()
    assert build[0].oddities[DUPLICATE]["first"] == "mine-00000001 and mine-00000000"
    assert build[0].oddities[LONG]["first"] == "mine-00000001"
    assert merge_oddities([(3, {}), (3, {})]) == {}  # parts of builds before there were such logs


@pytest.mark.slow
def test_the_page_shows_what_is_odd(raw: Path, tmp_path: Path) -> None:
    files = pictures()
    for name, (data, _) in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    rows = [{"image": f"{name}.png", "question": "What?", "answer": "This."} for name in files]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage, where = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1}), str(tmp_path / "out/mine")
    row = Row.model_validate(QUESTIONS)
    built = build_dataset(row, "sft", stage, factory(raw, "sft", 1), raw=tmp_path, out=where)
    write_report_json("sft/mine", built, (0, 1), where, 1.0)
    page = tmp_path / "page.html"
    command = ["tools/inspect_shards.py", where, "--html", str(page), "--tokenizer", str(raw / "tokenizer")]
    subprocess.run([python(), *command], cwd=ROOT, check=True, capture_output=True)
    rows_of_table = re.findall(r"<tr>.*?</tr>", page.read_text(), re.DOTALL)
    numbers = {
        kind: [row.count("data:image/jpeg") for row in rows_of_table if kind in row]
        for kind in (TRANSPARENT, TURNED, DEEP, FLAT, TINY, DUPLICATE)
    }
    assert numbers == {**{kind: [1] for kind in (TRANSPARENT, TURNED, DEEP, FLAT, TINY)}, DUPLICATE: [2]}
    assert "Fill expected: alone in packs of" in page.read_text()


def test_points_on_the_edge_are_counted_by_sample(raw: Path, tmp_path: Path) -> None:
    """Points up to a hundredth outside are moved to the edge; further ones are rejected."""
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.fromarray(NOISE)))
    places = [[[50, 50]], [[100.5, 50], [-0.5, 3]], [[50, 200]], [[0, 100]]]
    rows = [{"image": "a.png", "label": "dot", "points": points} for points in places]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = Row.model_validate(
        QUESTIONS
        | {"converter": "image_points", "columns": {"image": "image", "label": "label", "points": "points"}}
        | {"options": {"scale": "percent", "styles": ["pointing"], "max_points": 9}}
    )
    stage = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1})
    make = factory(raw, "sft", 1)
    built = build_dataset(row, "sft", stage, make, raw=tmp_path, out=tmp_path / "out", reject_budget=1)
    assert {kind: (odd["number"], odd["first"]) for kind, odd in built.oddities.items()} == {
        EDGE: (2, "mine-00000001-pointing-0")
    }
    assert built.index is not None and built.index.totals.rejects == 1


def test_questions_of_held_out_rows_are_counted_in_the_training_report(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same question about the same pixels is one, whatever the names of the files; other pictures make another."""
    folder, out = tmp_path / "mine", tmp_path / "shards"
    folder.mkdir()
    noise = PIL.Image.fromarray(NOISE)
    (folder / "a.png").write_bytes(encoded(noise))
    (folder / "copy.png").write_bytes(encoded(noise, compress_level=0))
    (folder / "flat.png").write_bytes(encoded(PIL.Image.new("RGB", (60, 40), "red")))
    tables = {
        "train": [("a.png", "What?"), ("a.png", "Where?"), ("flat.png", "What?"), ("copy.png", " what? ")],
        "validation": [("copy.png", "What?")],
    }
    for split, rows in tables.items():
        lines = [json.dumps({"image": image, "question": question, "answer": "x"}) for image, question in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: f"{split}.jsonl" for split in tables}
    row = Row.model_validate(QUESTIONS | {"stages": ["sft", "eval"], "files": files, "metric": "exact_match"})
    settings = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1, "examples_per_shard": 1})
    for stage in ("sft", "eval"):
        where = str(out / stage / "mine")
        built = build_dataset(row, stage, settings, factory(raw, stage, 1), raw=folder, out=where)
        write_report_json(f"{stage}/mine", built, (0, 1), where, 1.0)
        assert SHARED not in report(out / "sft/mine")["oddities"]
        count_shared_questions(row, stage, str(out))
    assert report(out / "sft/mine")["oddities"][SHARED] == {"number": 2, "first": "mine-00000000", "shown": []}
    assert f"sft/mine: used, but look: 2 {SHARED} (first: mine-00000000)" in capsys.readouterr().out
    assert SHARED not in report(out / "eval/mine")["oddities"]
    facts = facts_of(open_dataset(str(out / "sft"), "mine"))
    assert [odd.number for odd in facts.oddities if odd.kind == SHARED] == [2]


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_the_fill_is_that_of_the_packs_that_the_planner_makes(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PIL.Image.fromarray(NOISE)))
    rows = [{"image": "a.png", "question": "What?", "answer": "no " * number} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = load_catalog("demo").stages["sft"].model_copy(update={"num_variants": 1})
    row = Row.model_validate(QUESTIONS)
    build_dataset(row, "sft", stage, factory(raw, "sft", 1), raw=tmp_path, out=tmp_path / "sft/mine", reject_budget=1)
    fill = expected_fill(open_dataset(str(tmp_path / "sft"), "mine"))
    assert fill is not None
    limits = stage.limits
    settings = PlanSettings(
        sequence_length=limits.sequence_length, max_crops=limits.max_crops, packs_per_step=1, window=590
    )
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"mine": None}}}})
    plan, cursor, sizes = open_plan((str(tmp_path / "sft"),), mixture, settings), Cursor(), []
    for _ in range(40):
        step = plan.step(cursor)
        sizes += [pack.sizes for pack in step.packs]
        cursor = step.cursor
    planned = sum(size.tokens for size in sizes) / (len(sizes) * limits.sequence_length)
    assert fill.tokens == pytest.approx(planned, abs=0.05)
    assert f"{fill.tokens:.0%} of the tokens" in fill.text
