"""Reading a catalog file: YAML with templates, so that settings that rows share are written once.

    templates:
      tracks: {stages: [sft, long], converter: video_track}
      mevis: {like: tracks, media: "JPEGImages/{value}"}
    rows:
      - {like: [mevis, all], name: mevis-track}

`like` takes whole keys from the templates of the same file, in order: a later template wins over an earlier one, and
the mapping's own keys win over all of them. It works in any mapping of the file, templates included. YAML's own merge
keys (`<<`) are refused, because PyYAML 6.0.3 and 6.0.4 merge a list of mappings differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shards.catalog.nearest import did_you_mean
from shards.yaml_limits import check_yaml

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast
except ImportError:  # PyYAML was installed without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

MERGE_TAG = "tag:yaml.org,2002:merge"


class CatalogError(ValueError):
    """A catalog cannot be read, or a name is not in it."""


def read_catalog_file(path: Path) -> dict[str, Any]:
    """Read a catalog file as a mapping; `like` keys are replaced by their templates, and `templates` is removed.

    Raises:
        CatalogError: the file cannot be read or is not a mapping, has a merge key or a duplicate key, or a `like`
            names no template.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        document = _Loader(text).get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:  # a ValueError: no UTF-8, a date of month 99
        raise CatalogError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise CatalogError(f"{path}: expected a mapping, found {type(document).__name__}")
    templates = document.get("templates") or {}
    if not isinstance(templates, dict):
        raise CatalogError(f"{path}: `templates` must map names to templates, found {type(templates).__name__}")
    try:
        filled: dict[str, Any] = fill_templates(document, templates)
    except CatalogError as error:
        raise CatalogError(f"{path}: {error}") from None
    filled.pop("templates", None)
    return filled


def fill_templates(value: Any, templates: dict[str, Any], users: tuple[str, ...] = ()) -> Any:
    """A copy of a value in which every `like: NAME` or `like: [NAME, ...]` is replaced by the keys of those templates.

    Args:
        value: the content of a YAML file, or a part of it.
        templates: name -> template; only mappings can be named in `like`.
        users: templates that are being filled in and contain `value`, outermost first; used to detect a cycle.

    Raises:
        CatalogError: a template is unknown or not a mapping, or templates refer to each other in a cycle.
    """
    if isinstance(value, list):
        return [fill_templates(item, templates, users) for item in value]
    if not isinstance(value, dict):
        return value
    merged: dict[Any, Any] = {}
    for name in _names(value.get("like", [])):
        if name in users:
            raise CatalogError(f"templates in a circle: {' -> '.join([*users[users.index(name) :], name])}")
        if not isinstance(templates.get(name), dict):
            raise CatalogError(_no_such_template(name, templates))
        merged |= fill_templates(templates[name], templates, (*users, name))
    return merged | {key: fill_templates(item, templates, users) for key, item in value.items() if key != "like"}


def _names(like: Any) -> list[str]:
    names = like if isinstance(like, list) else [like]
    if not all(isinstance(name, str) for name in names):
        raise CatalogError(f"`like: {like!r}`: expected the name of a template, or a list of names")
    return names


def _no_such_template(name: str, templates: dict[str, Any]) -> str:
    if name in templates:
        return f"`like: {name}`: template {name!r} is not a mapping; use an anchor and an alias for a text or a list"
    known = [key for key, template in templates.items() if isinstance(template, dict)]
    hint = did_you_mean(name, known).strip() or f"known: {', '.join(known) or 'none'}."
    return f"`like: {name}`: no template {name!r}; {hint} Write it under `templates:` of this file, or drop `like`"


class _Loader(SafeLoader):
    """A YAML loader that refuses merge keys and duplicate keys, which would silently change a mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key_node, _ in pairs:
            if key_node.tag == MERGE_TAG:
                problem = "merge keys (`<<`) are refused; write the mapping under `templates:` and name it in `like:`"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in pairs:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {key!r} occurs twice in a mapping; remove one of the two"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return mapping
