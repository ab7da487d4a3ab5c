"""Templates of catalog files: who wins, nesting, and every way to get one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.catalog import CatalogError, load_catalog
from shards.catalog.templates import fill_templates, read_catalog_file

TEMPLATES: dict[str, Any] = {
    "first": {"a": 1, "b": 1, "c": {"x": 1, "y": 1}},
    "second": {"b": 2, "c": {"z": 2}},
    "third": {"like": ["first", "second"], "d": 3},
}


def read(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return read_catalog_file(path)


@pytest.mark.parametrize(
    ("mapping", "filled"),
    [
        ({"like": "first", "name": "n"}, {"a": 1, "b": 1, "c": {"x": 1, "y": 1}, "name": "n"}),
        ({"like": ["first", "second"]}, {"a": 1, "b": 2, "c": {"z": 2}}),
        ({"like": ["second", "first"]}, {"a": 1, "b": 1, "c": {"x": 1, "y": 1}}),
        ({"b": 0, "like": ["first", "second"]}, {"a": 1, "b": 0, "c": {"z": 2}}),
        ({"like": "third", "a": 0}, {"a": 0, "b": 2, "c": {"z": 2}, "d": 3}),
        ({"like": []}, {}),
        ({"rows": [{"columns": {"like": "second", "b": 0}}]}, {"rows": [{"columns": {"b": 0, "c": {"z": 2}}}]}),
    ],
)
def test_a_later_template_wins_and_the_own_keys_win_over_all(mapping: dict[str, Any], filled: dict[str, Any]) -> None:
    before = yaml.safe_dump(TEMPLATES)
    assert fill_templates(mapping, TEMPLATES) == filled
    assert yaml.safe_dump(TEMPLATES) == before


def test_templates_are_taken_from_the_file_and_left_out(tmp_path: Path) -> None:
    text = """
templates:
  terms: &terms ask first
  qa: {converter: image_qa, columns: {like: names}, source: {licence: *terms}}
  names: {image: image}
rows:
  - {like: qa, name: x, columns: {like: names, question: q}}
"""
    source = {"licence": "ask first"}
    row = {"converter": "image_qa", "source": source, "name": "x", "columns": {"image": "image", "question": "q"}}
    assert read(tmp_path, text) == {"rows": [row]}


def test_each_file_of_a_folder_has_its_own_templates(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("preset: tiny\ntokenizer: t\nstages: {}\n")
    row = "{like: t, name: %s, stages: [sft], files: {train: a}, converter: chat, columns: {messages: m}}"
    (tmp_path / "a.yaml").write_text(f"templates: {{t: {{options: {{style: vqa2}}}}}}\nrows: [{row % 'one'}]\n")
    (tmp_path / "b.yaml").write_text(f"templates: {{t: {{options: {{style: user_qa}}}}}}\nrows: [{row % 'two'}]\n")
    assert [row.options for row in load_catalog(str(tmp_path)).rows] == [{"style": "vqa2"}, {"style": "user_qa"}]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("templates: {tracks: {a: 1}}\nrows: [{like: track}]", r"like: track`.*did you mean 'tracks'\?.*`templates:`"),
        ("templates: {tracks: {a: 1}}\nrows: [{like: qqq}]", r"no template 'qqq'; known: tracks\."),
        ("rows: [{like: qqq}]", r"no template 'qqq'; known: none\."),
        ("templates: {a: {like: b}, b: {x: {like: c}}, c: {like: b}}", r"in a circle: b -> c -> b$"),
        ("templates: {a: {like: a}}", r"in a circle: a -> a$"),
        ("templates: {unused: {like: gone}}", r"no template 'gone'"),
        ("templates: {text: t}\nrows: [{like: text}]", r"template 'text' is not a mapping"),
        ("rows: [{like: {a: 1}}]", r"expected the name of a template, or a list of names"),
        ("templates: [a]", r"`templates` must map names to templates, found list"),
        ("a: &a {x: 1}\nb: {<<: *a}", r"merge keys \(`<<`\) are refused(.|\n)*`like:`(.|\n)*line 2, column 5"),
        ("a: &a {x: 1}\nb: {c: {y: 2, <<: [*a, *a]}}", r"merge keys"),
        ("rows:\n  - name: x\n    name: y\n", r"key 'name' occurs twice(.|\n)*line 3, column 5"),
        ("rows: []\nrows: []\n", r"key 'rows' occurs twice"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(CatalogError, match=match) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: ")
