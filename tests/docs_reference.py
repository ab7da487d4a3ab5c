"""The reference pages of `docs/`, made from the models, docstrings and templates of the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pydantic

from molmo2 import config
from molmo2.processing.contract import templates
from molmo2.processing.prompts import render_messages
from shards.catalog import Catalog, StageSettings, row
from shards.catalog.converters import CONVERTER_OPTIONS, ConverterOptions
from shards.catalog.styles import STYLES
from shards.convert import CONVERTERS
from shards.schema import Annotation, Choice, Limits, PointGroup, Points, RejectedError, Text, TrackGroup, Tracks
from shards.stream.mixture import Member, MixtureGroup

MADE = "It is generated from the code: `UPDATE_GOLDEN=1 python -m pytest tests/docs/test_reference.py` writes it anew."
# A type with validators is shown as the type alone.
VALIDATED = re.compile(r"(?:typing\.)?Annotated\[(.*), (?:pydantic\.)?(?:Before|After)Validator\(\w+\)\]")


def cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return [*lines, *(f"| {' | '.join(map(cell, entries))} |" for entries in rows), ""]


# --- descriptions: the section "Attributes" of a docstring, or the comment beside a field -----------------------------


def attributes(model: type) -> dict[str, str]:
    """Field -> its description in the docstring of the model or of a model that it inherits from."""
    described: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        _, _, section = inspect.cleandoc(owner.__dict__.get("__doc__") or "").partition("Attributes:\n")
        for names, text in re.findall(r"^    ([\w, ]+): ((?:.|\n(?!    \w|$))*)", section, re.MULTILINE):
            described |= dict.fromkeys(names.split(", "), text)
    return described


def summary(model: Any) -> str:
    """A docstring without its sections."""
    return re.split(r"\n\n(?:Attributes|Args|Raises|Returns):", inspect.getdoc(model) or "")[0]


def annotation_of(model: type, name: str) -> str:
    """The type of a field as the code has it."""
    written = next(owner.__annotations__[name] for owner in model.__mro__ if name in inspect.get_annotations(owner))
    return f"`{' '.join(VALIDATED.sub(lambda match: match[1], written).split())}`"


def default_of(field: pydantic.fields.FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, pydantic.BaseModel):
        return "its defaults"
    return "none" if value is None else "empty" if value in ((), {}, "") else f"`{value}`"


def key_rows(model: type[pydantic.BaseModel], described: dict[str, str]) -> list[list[object]]:
    fields = model.model_fields.items()
    return [[f"`{key}`", annotation_of(model, key), default_of(field), described.get(key, "")] for key, field in fields]


# --- pages ------------------------------------------------------------------------------------------------------------


def converters_page() -> str:
    lines = [
        "# Reference: converters",
        "",
        "A catalog row names a `converter`, its `columns` (field of the converter → column of the files) and its",
        "`options`. `image_#` stands for `image_1`, `image_2` and so on.",
        "",
        MADE,
        "",
    ]
    for name, options in CONVERTER_OPTIONS.items():
        lines += [f"## {name}", "", summary(CONVERTERS[name]), "", summary(options), ""]
        needed = ", ".join(f"`{entry.replace('|', '` or `')}`" for entry in options.required)
        lines += [f"- Columns it needs: {needed}."]
        others = ", ".join(f"`{entry}`" for entry in options.optional) or "none"
        lines += [f"- Columns it may have: {others}."]
        lines += [f"- `{option}` and the column `{field}` belong together." for option, field in options.paired.items()]
        lines += [""]
        if options.model_fields:
            lines += table(["option", "type", "default", "meaning"], option_rows(options))
    return "\n".join(lines)


def option_rows(options: type[ConverterOptions]) -> list[list[object]]:
    described = attributes(options)
    text = summary(options)
    for name in options.model_fields:  # "`style` is the style of the conversations"
        if name not in described and (said := re.search(rf"`{name}` (?:is|are) ((?:[^.;])*)", text)):
            described[name] = f"{said[1]}."
    return key_rows(options, described)


LABEL, SPOT = "red cars", (0.25, 0.5)


def example_of(style: str) -> Annotation:
    """An annotation that has this style."""
    forms = " ".join(templates().get(style, []))
    if "track" in style or "ground" in style:
        groups = tuple(TrackGroup(time=time, objects=((1, *SPOT),)) for time in (0.0, 1.0, 2.0))
        return Tracks(style=style, label=LABEL, fps=2.0, groups=groups)
    if "{label}" in forms:
        return Points(style=style, label=LABEL, groups=(PointGroup(at=1, points=(SPOT,)),))
    if "multiple_choice" in style or style.endswith("_mc"):
        return Choice(style=style, question="What is it?", options=("a cat", "a dog"), answer=1)
    plain = bool(forms) and "{question}" not in forms
    return Text(style=style, question="" if plain else "What is it?", answer="A dog.")


def styles_page() -> str:
    lines = [
        "# Reference: styles",
        "",
        "A style says what kind of answer a question has, and how it is asked. In pre-training the prompt begins with",
        "the style's name and a hint of the answer's length. Later the question is in natural language; a style of a",
        "benchmark keeps its name before it. The prompts below are those of evaluation; training draws one of the",
        "wordings in `molmo2/processing/templates/`. A name of your own, which the catalog lists in `styles`, gives",
        "the prompt `my_style: question`.",
        "",
        MADE,
        "",
    ]
    rows: list[list[object]] = []
    for style in sorted(STYLES):
        annotation = example_of(style)
        video = style.startswith("video") or isinstance(annotation, Tracks)
        prompts = []
        for mode in ("eval", "pretraining"):
            try:
                user, assistant = render_messages(annotation, mode, None, video=video)
            except RejectedError:  # a question of the data is needed
                annotation = Text(style=style, question="What is it?", answer="A dog.")
                user, assistant = render_messages(annotation, mode, None, video=video)
            prompts.append((user.content, assistant.content))
        (prompt, answer), (first, _) = prompts
        kind = {"Text": "text", "Choice": "choice", "Points": "points", "Tracks": "tracks"}[type(annotation).__name__]
        number = len(templates().get(style, ()))
        rows.append([f"`{style}`", kind, f"`{prompt}`", f"`{answer}`", f"`{first}`", number or "-"])
    header = ["style", "answer", "prompt", "answer of the example", "prompt in pre-training", "wordings"]
    return "\n".join([*lines, *table(header, rows)])


def commented(model: type) -> dict[str, str]:
    """Field -> the comment on its line in the source, or on the line before."""
    source = inspect.getsource(model)
    lines, described = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, mark, text = lines[node.end_lineno - 1].partition("  # ")  # type: ignore[operator]
            before = lines[node.lineno - 2].strip()
            described[node.target.id] = text if mark else before.removeprefix("# ") if before.startswith("# ") else ""
    return described


SECTIONS: dict[str, type[pydantic.BaseModel]] = {
    "": config.Recipe,
    "data": config.Data,
    "train": config.Train,
    "train.pack_cost": config.MeasuredCost,
    "optim": config.Optim,
    "optim.vit, optim.connector, optim.llm": config.OptimGroup,
    "optim.lora": config.Lora,
    "anomalies": config.Anomalies,
    "eval": config.Evaluation,
    "logging": config.Logging,
    "init": config.FirstWeights,
    "data.mixture.groups.NAME": MixtureGroup,
    "data.mixture.groups.NAME.datasets.NAME": Member,
}


def recipe_page() -> str:
    lines = [
        "# Reference: recipe",
        "",
        "A recipe is one YAML file, and `--set a.b=value` overrides a key. An unknown key is refused with the nearest",
        "known one. Paths are relative to `MOLMO2_DATA` (default `./data`).",
        "",
        MADE,
        "",
    ]
    for place, model in SECTIONS.items():
        lines += [f"## {place or 'top'}", "", summary(model), ""]
        lines += table(["key", "type", "default", "meaning"], key_rows(model, commented(model)))
    return "\n".join(lines)


PARTS: dict[str, type[pydantic.BaseModel]] = {
    "a catalog": Catalog,
    "stages.NAME": StageSettings,
    "rows": row.Row,
    "rows: table": row.TableFormat,
    "rows: filters": row.Filter,
    "rows: skip": row.Skip,
    "rows: exclude": row.Exclusion,
    "rows: lookups": row.Lookup,
    "rows: masks": row.Masks,
    "rows: benchmark": row.BenchmarkSpec,
    "rows: download, folders.NAME.download": row.Download,
    "folders.NAME": row.Folder,
    "size": row.Size,
}


def catalog_page() -> str:
    lines = [
        "# Reference: catalog",
        "",
        "A catalog is one YAML file, or a folder of them. `base: NAME` inherits the settings of another catalog, and",
        "`templates` with `like` write shared keys once ([own-data.md](own-data.md)). An unknown key is refused with",
        "the nearest known one.",
        "",
        MADE,
        "",
    ]
    for place, model in PARTS.items():
        lines += [f"## {place}", "", summary(model), ""]
        lines += table(["key", "type", "default", "meaning"], key_rows(model, attributes(model)))
        if model is StageSettings:
            values = [(name, field.default) for name, field in Limits.__dataclass_fields__.items()]
            given = ", ".join(
                f"`{name}`" + ("" if "MISSING" in repr(value) else f" (`{value}`)") for name, value in values
            )
            lines += [f"`limits` has {given}. {summary(Limits)}", ""]
    return "\n".join(lines)


PAGES = {
    "reference-converters.md": converters_page,
    "reference-styles.md": styles_page,
    "reference-recipe.md": recipe_page,
    "reference-catalog.md": catalog_page,
}
DOCS = Path(__file__).resolve().parents[1] / "docs"
