"""The report of a build counts peculiar pictures and answers, which are used all the same."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from build_cases import QUESTIONS, factory

from shards.build.builder import build_dataset
from shards.build.oddities import DUPLICATE, LONG, merge_oddities
from shards.catalog import Row, load_catalog
from shards.media.images import DEEP, FLAT, TINY, TRANSPARENT, TURNED, load_image, load_with_notes
from shards.schema import ImageRef

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
    assert build[0].oddities[DUPLICATE]["first"] == "mine-00000001 and mine-00000000"
    assert build[0].oddities[LONG]["first"] == "mine-00000001"
    assert merge_oddities([{}, {}]) == {}  # parts of builds before there were such logs
