"""A row against its converter: wrong names are refused with the nearest one, and the declarations are what is read."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from catalog_cases import cases, catalog, image, write_raw

import shards.convert
from shards.catalog import CatalogError, Row, load_catalog
from shards.catalog.converters import CONVERTER_OPTIONS, converter_problems
from shards.catalog.styles import KINDS, STYLE_OPTIONS, STYLES, USES
from shards.convert import CONVERTERS
from shards.convert.common import Group
from shards.convert.reading import convert, open_rows, read_groups
from shards.schema import Example, Source
from shards.sources.media_files import MediaFiles

QA = {"image": "image", "question": "q", "answer": "a"}


def row_of(converter: str, columns: dict[str, str], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    row = {"name": "mine", "stages": ["sft"], "files": {"train": "*.jsonl"}}
    return {**row, "converter": converter, "columns": columns, "options": options, **more}


def load(folder: Path, *rows: dict[str, Any]) -> Any:
    content = {"preset": "tiny", "tokenizer": "t", "stages": {}, "rows": list(rows)}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_catalog(str(folder / "mine.yaml"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            row_of("image_qa", QA, {"style": "user_qa", "count_prefix": ["No points."]}),
            "row mine: options.count_prefix: converter image_qa has no such option; did you mean 'count_prefixes'? "
            "known: style, count_prefixes, weights, flat",
        ),
        (  # an option that another converter has
            row_of("image_qa", QA, {"style": "user_qa", "max_points": 3}),
            "row mine: options.max_points: converter image_qa has no such option; known: style, count_prefixes, ",
        ),
        (row_of("image_qa", QA, {}), "row mine: options.style: converter image_qa needs this option"),
        (
            row_of("image_qa", QA, {"style": "user_qa", "flat": "perhaps"}),
            "row mine: options.flat: Input should be a valid boolean, unable to interpret input (given: 'perhaps')",
        ),
        (
            row_of("image_choice", QA, {"style": "user_qa", "answer": "number"}),
            "row mine: options.answer: Input should be 'index', 'letter' or 'text' (given: 'number')",
        ),
        (
            row_of("image_qa", {"image": "i", "qestion": "q", "answer": "a"}, {"style": "user_qa"}),
            "row mine: columns.qestion: converter image_qa reads no such field; did you mean 'question'? known: image,",
        ),
        (
            row_of("image_qa", {"image": "i", "answer": "a"}, {"style": "user_qa"}),
            "row mine: columns: converter image_qa needs the field question",
        ),
        (
            row_of("image_choice", {"question": "q", "answer": "a"}, {"style": "user_qa"}),
            "row mine: columns: converter image_choice needs the field image or image_1",
        ),
        (
            row_of("video_caption", {"video": "v", "video_long_caption": "c"}, {"min_score": 3}),
            "row mine: options.min_score and columns.score belong together; give both or neither",
        ),
        (
            row_of("image_qa", {**QA, "weight_of": "k"}, {"style": "user_qa"}),
            "row mine: options.weights and columns.weight_of belong together; give both or neither",
        ),
        (
            row_of(
                "multi_image_points",
                {"image": "i", "labels": "l", "points": "p"},
                {"scale": "percent", "styles": ["a", "b"], "max_points": 9, "ask_some": {"a": ["Point to {label}."]}},
            ),
            "row mine: options: ask_some has no questions for b",
        ),
        (
            row_of("image_aq", QA, {"style": "user_qa"}),
            "row mine: no converter 'image_aq'; did you mean 'image_qa'? known: chat, ",
        ),
    ],
)
def test_a_row_that_does_not_fit_its_converter_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogError) as error:
        load(tmp_path, row)
    assert f"\n  {message}" in str(error.value)


@pytest.mark.parametrize(
    ("converter", "columns", "options", "message"),
    [
        ("image_qa", QA, {"style": "usr_qaa"}, "options.style: no style 'usr_qaa'; did you mean 'user_qa'? "),
        (
            "image_choice",
            QA,
            {"style": "vqa2", "open_style": "okvqq"},
            "options.open_style: no style 'okvqq'; did you mean 'okvqa'? ",
        ),
        (
            "image_points",
            {"image": "i", "label": "l"},
            {"scale": "percent", "styles": ["pointing", "point_cuont"], "max_points": 9},
            "options.styles: no style 'point_cuont'; did you mean 'point_count'? ",
        ),
    ],
)
def test_an_unknown_style_is_refused_unless_the_catalog_has_it(
    tmp_path: Path, converter: str, columns: dict[str, str], options: dict[str, Any], message: str
) -> None:
    row = row_of(converter, columns, options)
    with pytest.raises(CatalogError, match=re.escape(f"row mine: {message}docs/reference-styles.md")):
        load(tmp_path, row)
    content = {"preset": "tiny", "tokenizer": "t", "stages": {}, "rows": [row]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, "styles": ["usr_qaa", "okvqq", "point_cuont"]}))
    assert load_catalog(str(tmp_path / "mine.yaml")).rows[0].options == options


IMAGE_POINTS = {"scale": "percent", "max_points": 9}


@pytest.mark.parametrize(
    ("converter", "columns", "options", "message"),
    [
        (
            "image_points",
            {"image": "i", "label": "l"},
            {**IMAGE_POINTS, "styles": ["pointing", "video_point_count"]},
            "options.styles: style 'video_point_count' is one of points in a video, and converter image_points has "
            "points in an image; did you mean 'point_count'? use cosyn_point, count, ",
        ),
        (
            "image_caption",
            {"image": "i", "caption": "c"},
            {"style": "video_long_caption"},
            "options.style: style 'video_long_caption' is one of texts about a video, and converter image_caption has "
            "captions of images; did you mean 'long_caption'? use long_caption, short_caption, transcript",
        ),
        ("image_caption", {"image": "i", "caption": "c"}, {"style": "user_qa"}, "options.style: style 'user_qa' is"),
        ("image_qa", QA, {"style": "pointing"}, "options.style: style 'pointing' is one of points in an image, and"),
        ("image_qa", QA, {"style": "science_qa"}, "options.style: style 'science_qa' is one of answer options, and"),
        (
            "image_choice",
            QA,
            {"style": "science_qa", "open_style": "a_okvqa_mc"},
            "options.open_style: style 'a_okvqa_mc' is one of answer options, and converter image_choice has "
            "questions or captions of images; did you mean 'a_okvqa_da'? docs/reference-styles.md lists all",
        ),
    ],
)
def test_a_style_of_another_kind_is_refused_with_the_nearest_that_suits(
    tmp_path: Path, converter: str, columns: dict[str, str], options: dict[str, Any], message: str
) -> None:
    row = row_of(converter, columns, options)
    with pytest.raises(CatalogError, match=re.escape(f"row mine: {message}")):
        load(tmp_path, row)


def test_captions_with_questions_of_their_own_take_styles_of_questions(tmp_path: Path) -> None:
    columns = {"image": "i", "caption": "c", "question": "q"}
    load(tmp_path, row_of("image_caption", columns, {"style": "user_qa"}))


def test_every_converter_with_styles_has_its_kinds() -> None:
    with_styles = {name for name, model in CONVERTER_OPTIONS.items() if {*STYLE_OPTIONS} & {*model.model_fields}}
    assert {use.partition(".")[0] for use in USES} == with_styles
    assert sum(map(len, KINDS.values())) == len(STYLES)  # a style is of one kind


def test_unknown_settings_of_a_catalog_are_refused_with_the_nearest(tmp_path: Path) -> None:
    content = {"preset": "tiny", "tokenizer": "t", "stages": {}, "rows": [], "lft_out": {}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CatalogError, match=r"lft_out: unknown key; did you mean 'left_out'\? known: "):
        load_catalog(str(tmp_path / "mine.yaml"))


def test_all_problems_of_all_rows_are_listed(tmp_path: Path) -> None:
    first = row_of("image_qa", {**QA, "hnt": "h"}, {"stlye": "user_qa"})
    second = {**row_of("chat", {}, {"style": "user_qa"}), "name": "other"}
    with pytest.raises(CatalogError) as error:
        load(tmp_path, first, second)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["  row mine"] * 3 + ["  row other"]
    row = row_of("image_qa", QA, {"style": "user_qa"})
    with pytest.raises(CatalogError, match=r"row mine: colour: unknown key; .*known: benchmark, columns, "):
        load(tmp_path, {**row, "colour": "red"})
    benchmark = {"suite": "mine", "metric": "exact_match"}
    with pytest.raises(CatalogError, match=r'row mine: a benchmark needs stage "eval"; the stages are sft'):
        load(tmp_path, {**row, "benchmark": benchmark})
    evaluated = {**row, "stages": ["eval"], "files": {"validation": "v"}}
    with pytest.raises(CatalogError, match=r"row mine: benchmark\.0\.metrics: unknown key; did you mean 'metric'\? "):
        load(tmp_path, {**evaluated, "benchmark": {**benchmark, "metrics": "anls"}})
    (loaded,) = load(tmp_path, {**evaluated, "benchmark": [benchmark, {**benchmark, "name": "again"}]}).rows
    assert [spec.name for spec in loaded.benchmark] == [None, "again"]


def test_fields_with_numbers_and_columns_of_a_media_path_are_known(tmp_path: Path) -> None:
    numbered = {"image_1": "a", "image_12": "b", "question": "q", "answer": "a"}
    load(tmp_path, row_of("image_choice", numbered, {"style": "user_qa"}))
    inside = {**QA, "year": "meta.year"}
    load(tmp_path, row_of("image_qa", inside, {"style": "user_qa"}, media="{meta.year:04d}/{value}"))
    with pytest.raises(CatalogError, match=r"columns\.year: converter image_qa reads no such field"):
        load(tmp_path, row_of("image_qa", inside, {"style": "user_qa"}, media="{value}"))


def test_a_catalog_is_checked_without_the_code_of_the_converters() -> None:
    check = "import sys, shards.catalog as c; c.load_catalog('demo'); print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert not {"shards.convert", "PIL", "pyarrow", "torch"} & set(run.stdout.split())


def test_every_converter_takes_the_options_that_are_registered_for_it() -> None:
    assert CONVERTERS.keys() == CONVERTER_OPTIONS.keys()
    for name, converter in CONVERTERS.items():
        assert typing.get_type_hints(converter)["options"] is CONVERTER_OPTIONS[name], name
        for field in (*CONVERTER_OPTIONS[name].paired.values(),):
            assert CONVERTER_OPTIONS[name].reads(field)


def test_every_option_is_used_by_the_code() -> None:
    folder = Path(inspect.getfile(shards.convert)).parent
    used = set(re.findall(r"\boptions\.(\w+)", "".join(path.read_text() for path in folder.glob("*.py"))))
    assert {option for model in CONVERTER_OPTIONS.values() for option in model.model_fields} <= used


def group_of(folder: Path, row: dict[str, Any], values: dict[str, Any]) -> Group:
    source = (Source(file="t.jsonl", row=0),)
    media = MediaFiles(root=folder)
    return Group(row=Row(**row), stage="sft", media=media, key="mine-0", sources=source, values=(values,))


def test_a_field_that_is_not_declared_cannot_be_read(tmp_path: Path) -> None:
    group = group_of(tmp_path, row_of("chat", {"messages": "m", "hint": "h"}, {"style": "user_qa"}), {"h": "x"})
    for read in (group.get, group.text, group.items, group.maps, group.numbered):
        with pytest.raises(KeyError, match="converter chat reads the field 'hint"):
            read("hint")
    assert group.get("messages") is None


def test_every_declared_field_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the fixtures of the catalog, and two rows for the fields that only other rows need."""
    read: dict[str, set[str]] = defaultdict(set)
    maps = Group.maps

    def recording(self: Group, field: str) -> bool:
        read[self.row.converter].add(re.sub(r"_\d+$", "_#", field))
        return maps(self, field)

    monkeypatch.setattr(Group, "maps", recording)
    for name, stage in cases():
        (row,) = catalog().select(stage, [name])
        raw = tmp_path / name / stage
        if set(CONVERTER_OPTIONS[row.converter].fields_read()) <= read[row.converter]:
            continue
        write_raw(raw, row)
        table = open_rows(row, stage, raw / row.folder)
        for group in read_groups(row, stage, raw / row.folder, table, table.groups(row.group_by)[:1]):
            list(convert(group))
    (tmp_path / "1.png").write_bytes(image("8x8:red"))
    (tmp_path / "v.mp4").touch()
    by_name = {name: name for name in ("image", "labels", "points", "video", "label", "times", "width", "height")}
    ask = {"video_point_count": ["Where in {images}?"]}
    options = {"scale": "percent", "styles": ["video_point_count"], "max_points": 9}
    one_image = row_of("multi_image_points", by_name, {**options, "ask_some": ask})
    pixels = row_of("video_points", by_name, {**options, "scale": "pixel"})
    points = [{"x": 4, "y": 2}]
    image_values = {"image": "1.png", "labels": ["a"], "points": [points]}
    video_values = {"video": "v.mp4", "label": "a", "times": [0], "points": [points], "width": 8, "height": 8}
    for row_dict, values in ((one_image, image_values), (pixels, video_values)):
        (example,) = convert(group_of(tmp_path, row_dict, values))
        assert isinstance(example, Example)
    assert dict(read) == {name: set(model.fields_read()) for name, model in CONVERTER_OPTIONS.items()}


def test_rows_that_are_changed_after_loading_are_checked_again_by_a_build() -> None:
    (row,) = load_catalog("demo").select("sft", ["demo-chat"])
    assert converter_problems(row) == []
    (problem,) = converter_problems(row.model_copy(update={"options": {"style": "a", "styles": ["b"]}}))
    assert "options.styles" in problem and "did you mean 'style'?" in problem
