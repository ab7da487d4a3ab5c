"""Recognising the layout of a user's data: from some rows or file names to the keys of a catalog row.

A layout is a function in `TABLE_LAYOUTS` or `FOLDER_LAYOUTS`. It sees a few rows of a table, or the names of all files
of a folder, and returns a `Layout`, or None if the data have another one. What the data do not show is looked up in
`answers`, and asked for by an `UnsureError` if it is not there. `tools/new_dataset.py` writes the catalog.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from shards.convert.answer_options import listed
from shards.convert.common import text_of, xy_pairs
from shards.convert.layout_columns import (
    IMAGE_SUFFIXES,
    NAMES,
    Answers,
    Layout,
    Rows,
    chosen,
    find_column,
    media_column,
    values_of,
)

STYLES = ["pointing", "point_count"]
MAX_POINTS = 60
CLASS_QUESTION = "What does the picture show?"


def conversations(rows: Rows, answers: Answers) -> Layout | None:
    """Lists of messages: ShareGPT and LLaVA ({from, value}), OpenAI, Qwen and ms-swift ({role, content})."""
    column = find_column(rows, "messages")
    messages = values_of(rows, column) if column else []
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        return None
    columns = {"messages": column}
    for kind in ("image", "video"):
        if (media := media_column(rows, kind)) is not None:
            columns[kind] = media
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    text = str([*columns, *(key for part in parts if isinstance(part, Mapping) for key in (part.get("type"), *part))])
    media = next((kind for kind in ("video", "image") if kind in text), "text")
    shape = "ShareGPT or LLaVA" if "from" in messages[0] else "OpenAI, Qwen or ms-swift"
    keys = {"converter": "chat", "columns": columns, "options": {"style": "user_qa"}}
    return Layout(
        name=f"conversations ({shape})", keys=keys, media=media, media_column=columns.get("image", columns.get("video"))
    )


def instructions(rows: Rows, answers: Answers) -> Layout | None:
    """Alpaca: instruction, input and output, with a system message and earlier turns if there are any.

    Instructions about media are such only if there is an input; the others are questions and answers.
    """
    image, video = media_column(rows, "image"), media_column(rows, "video")
    if not {"instruction", "output"} <= {name for row in rows for name in row}:
        return None
    if (image or video) and not any(row.get("input") for row in rows):
        return None
    if video or (image and not all(isinstance(value, str) for value in values_of(rows, image))):
        raise ValueError("instruction, input and output with a video or an embedded image: join instruction and input")
    media = "image" if image else "text"
    columns = {"messages": "messages"} | ({"image": "image"} if image else {})
    return Layout(
        name="instructions (Alpaca)",
        keys={"converter": "chat", "columns": columns, "options": {"style": "user_qa" if image else "text_sft"}},
        media=media,
        media_column=columns.get("image"),
        rows=[{"messages": _turns(row)} | ({"image": row.get(image)} if image else {}) for row in rows],
    )


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a row of Alpaca."""
    asked = "\n".join(filter(None, map(text_of, (row.get("instruction"), row.get("input")))))
    turns = [("system", row.get("system"))]
    for question, answer in (*(row.get("history") or ()), (asked, row.get("output"))):
        turns += [("user", question), ("assistant", answer)]
    return [{"role": role, "content": text_of(text)} for role, text in turns if role != "system" or text]


def points(rows: Rows, answers: Answers) -> Layout | None:
    """Points on images, with a label."""
    image, column, label = media_column(rows, "image"), find_column(rows, "points"), find_column(rows, "label")
    if not image or not column or not label:
        return None
    pairs = [pair for row in rows for pair in _pairs(row.get(column))]
    keys = {
        "converter": "image_points",
        "columns": {"image": image, "label": label, "points": column},
        "options": {"scale": _scale(pairs, answers), "styles": STYLES, "max_points": MAX_POINTS},
    }
    return Layout(name="points on images", keys=keys, media_column=image)


def _pairs(value: Any) -> list[tuple[float, float]]:
    try:
        return xy_pairs(value)
    except (TypeError, KeyError, ValueError, IndexError):
        return [pair for item in value for pair in _pairs(item)] if isinstance(value, list) else []


def _scale(pairs: Sequence[tuple[float, float]], answers: Answers) -> str:
    largest = max((max(pair) for pair in pairs), default=0.0)
    if largest <= 1 and pairs:
        return "unit"
    if largest > 1000:
        return "pixel"
    choices = ("percent", "pixel", "thousand") if largest <= 100 else ("pixel", "thousand")
    return chosen("scale", f"Coordinates up to {largest:g}: in which unit are the points?", choices, answers)


def multiple_choice(rows: Rows, answers: Answers) -> Layout | None:
    """Questions with answer options, about images or videos."""
    question, options, answer = (find_column(rows, kind) for kind in ("question", "options", "answer"))
    image, video = media_column(rows, "image"), media_column(rows, "video")
    if not question or not options or not answer or not (image or video):
        return None
    given, texts = values_of(rows, answer), {str(value) for value in values_of(rows, options)}
    if all(str(value) in texts for value in given):
        form = "text"
    elif all(re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", str(value)) for value in given):
        form = "letter"
    elif all(re.fullmatch(r"\d+", str(value)) for value in given):
        form = "index"
    else:
        form = chosen(
            "answer", f"Column {answer}: how is the right option given?", ("index", "letter", "text"), answers
        )
    columns = {"question": question, "options": options, "answer": answer}
    if image:
        keys: dict[str, Any] = {"converter": "image_choice", "columns": {"image": image, **columns}}
        keys["options"] = {"style": "user_qa", "answer": form}
    else:
        keys = {"converter": "video_qa", "columns": {"video": video, **columns, **_clip(rows)}}
        keys["options"] = {"ask": ["choice"], "answer": form}
    if form == "index" and (first := _first_index([(row.get(options), row.get(answer)) for row in rows], answers)):
        keys["options"]["first"] = first
    return Layout(name="multiple choice", keys=keys, media="image" if image else "video", media_column=image or video)


def _first_index(pairs: Iterable[tuple[Any, Any]], answers: Answers) -> int:
    """Whether options are counted from 0 or 1, by pairs of the options and the number of the right one.

    Raises:
        UnsureError: no row shows it.
        ValueError: some rows count from 0 and others from 1.
    """
    numbers = [(len(listed(options)), int(number)) for options, number in pairs if str(number).isdecimal()]
    from_0, from_1 = (any(number == 0 for _, number in numbers), any(number == count for count, number in numbers))
    if from_0 and from_1:
        raise ValueError("the right options are counted from 0 in some rows and from 1 in others: make them alike")
    if from_0 or from_1:
        return int(from_1)
    return int(chosen("first", "Which number does the first answer option have?", ("0", "1"), answers))


def _clip(rows: Rows) -> dict[str, str]:
    named = {kind: find_column(rows, kind) for kind in ("start", "end")}
    return {kind: column for kind, column in named.items() if column is not None} if all(named.values()) else {}


def questions(rows: Rows, answers: Answers) -> Layout | None:
    """Open questions and answers, about images or videos."""
    question, answer = find_column(rows, "question"), find_column(rows, "answer")
    image, video = media_column(rows, "image"), media_column(rows, "video")
    if not question or not answer or not (image or video):
        return None
    columns = {"question": question, "answer": answer}
    if image:
        keys = {"converter": "image_qa", "columns": {"image": image, **columns}, "options": {"style": "user_qa"}}
        return Layout(name="questions about images", keys=keys, media_column=image)
    keys = {"converter": "video_qa", "columns": {"video": video, **columns, **_clip(rows)}}
    keys["options"] = {"open_style": "user_qa"}
    return Layout(name="questions about videos", keys=keys, media="video", media_column=video)


def captions(rows: Rows, answers: Answers) -> Layout | None:
    """Captions of images or videos."""
    caption, image, video = find_column(rows, "caption"), media_column(rows, "image"), media_column(rows, "video")
    if not caption or not (image or video):
        return None
    if image:
        keys: dict[str, Any] = {"converter": "image_caption", "columns": {"image": image, "caption": caption}}
        return Layout(name="captions of images", keys=keys, media_column=image)
    keys = {"converter": "video_caption", "columns": {"video": video, "video_long_caption": caption, **_clip(rows)}}
    return Layout(name="captions of videos", keys=keys, media="video", media_column=video)


def classes(rows: Rows, answers: Answers) -> Layout | None:
    """A class for each image, by its name; the question is added in a table of its own."""
    image = media_column(rows, "image")
    present = {name.lower(): name for row in rows for name in row}
    named = [present[name] for name in NAMES["label"] if name in present]
    label = next((name for name in named if all(_is_name(row.get(name)) for row in rows)), None)
    if not label or not image or not all(isinstance(row[image], str) for row in rows):
        return None
    return _class_layout("classes of images", [(row[image], row[label]) for row in rows])


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and not re.fullmatch(r"-?\d+", value)


def numbered_classes(rows: Rows, names: Mapping[str, Sequence[str]]) -> Layout | None:
    """A class for each image, by its number; `names`: column -> names of the classes that the table itself lists.

    Raises:
        ValueError: the names of the classes are not known.
    """
    label, image = find_column(rows, "label"), media_column(rows, "image")
    values = values_of(rows, label) if label else []
    if not label or not image or not values or not all(re.fullmatch(r"-?\d+", str(value)) for value in values):
        return None
    if label not in names:
        raise ValueError(
            f"column {label} holds numbers of classes ({values[0]}, ...), and no names are given for them: add a "
            "column class_name with the names, or put the pictures into a folder for each class"
        )
    classes = [
        {"label": number, "question": CLASS_QUESTION, "answer": name.replace("_", " ")}
        for number, name in enumerate(names[label])
    ]
    columns = {"image": image, "question": "class.question", "answer": "class.answer"}
    keys: dict[str, Any] = {"converter": "image_qa", "columns": columns, "options": {"style": "user_qa"}}
    keys["lookups"] = [{"name": "class", "key": "label", "column": label}]
    return Layout(name="numbered classes of images", keys=keys, media_column=image, classes=classes)


def _class_layout(name: str, pairs: Iterable[tuple[str, str]]) -> Layout:
    rows = [{"image": image, "question": CLASS_QUESTION, "answer": text.replace("_", " ")} for image, text in pairs]
    columns = {"image": "image", "question": "question", "answer": "answer"}
    keys = {"converter": "image_qa", "columns": columns, "options": {"style": "user_qa"}}
    return Layout(name=name, keys=keys, media_column="image", rows=rows)


def coco(document: Mapping[str, Any]) -> Layout | None:
    """COCO: the points of each category in an image are the centres of its boxes, or the visible keypoints by name."""
    images, annotations = document.get("images"), document.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list) or not images or not annotations:
        return None
    names = {image["id"]: image["file_name"] for image in images}
    categories = {category["id"]: category for category in document.get("categories", ())}
    places: dict[tuple[str, str], list[dict[str, float]]] = {}
    for annotation in annotations:
        category = categories.get(annotation.get("category_id"), {"name": "object"})
        image, label = names[annotation["image_id"]], str(category["name"]).replace("_", " ")
        if annotation.get("keypoints"):
            flat = annotation["keypoints"]
            for part, x, y, seen in zip(category["keypoints"], flat[::3], flat[1::3], flat[2::3], strict=True):
                if seen:
                    places.setdefault((image, f"{part} of the {label}".replace("_", " ")), []).append({"x": x, "y": y})
        elif annotation.get("bbox"):
            left, top, width, height = annotation["bbox"]
            places.setdefault((image, label), []).append({"x": left + width / 2, "y": top + height / 2})
    rows = [{"image": image, "label": label, "points": found} for (image, label), found in places.items()]
    keys = {
        "converter": "image_points",
        "columns": {"image": "image", "label": "label", "points": "points"},
        "group_by": "image",
        "options": {"scale": "pixel", "styles": STYLES, "max_points": MAX_POINTS},
    }
    return Layout(name="COCO boxes and keypoints, as points", keys=keys, media_column="image", rows=rows)


def pictures_with_texts(files: Sequence[str], read: Callable[[str], str]) -> Layout | None:
    """Pictures with a caption in a text file of the same name beside them."""
    texts = {name[: -len(".txt")]: name for name in files if name.lower().endswith(".txt")}
    pictures = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    both = [name for name in pictures if _stem(name) in texts]
    if not both:
        return None
    rows = [{"image": name, "caption": read(texts[_stem(name)]).strip()} for name in both]
    keys = {"converter": "image_caption", "columns": {"image": "image", "caption": "caption"}}
    return Layout(name="pictures beside .txt files", keys=keys, media_column="image", rows=rows)


def class_folders(files: Sequence[str], read: Callable[[str], str]) -> Layout | None:
    """A folder of pictures for each class."""
    pictures = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    labels = [PurePosixPath(name).parent.name for name in pictures]
    if len(set(labels)) < 2 or "" in labels:
        return None
    return _class_layout("a folder for each class", zip(pictures, labels, strict=True))


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


TABLE_LAYOUTS: tuple[Callable[[Rows, Answers], Layout | None], ...] = (
    conversations,
    instructions,
    points,
    multiple_choice,
    questions,
    captions,
    classes,
)
FOLDER_LAYOUTS: tuple[Callable[[Sequence[str], Callable[[str], str]], Layout | None], ...] = (
    pictures_with_texts,
    class_folders,
)


def recognise_rows(rows: Rows, answers: Answers) -> Layout | None:
    """The layout of a table, by its first rows.

    Raises:
        UnsureError: something about it must be answered first.
    """
    return next((layout for recognise in TABLE_LAYOUTS if (layout := recognise(rows, answers))), None)


def recognise_folder(files: Sequence[str], read: Callable[[str], str]) -> Layout | None:
    """The layout of a folder without tables; `read` gives the text of a file."""
    return next((layout for recognise in FOLDER_LAYOUTS if (layout := recognise(files, read))), None)
