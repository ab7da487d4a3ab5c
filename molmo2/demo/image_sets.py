"""The image and text sets of the demo: functions that make one example, in the columns of the imitated dataset.

Every function makes the rows of one picture (or conversation) from a generator and a pool of digits; it reads and
writes no file. It also returns the digits that it used, so that the split can be checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from molmo2.demo.digits import Generator, Pixels, PlacedDigit, Pool, draw, jpeg, place_word, png, scatter

CELL = 16  # side of a digit's cell, pixels
# Height and width of pictures, drawn with equal probability: multiples of a cell, and sizes that tilings cover exactly.
SHAPES = (*((48, 48),) * 6, (48, 80), (80, 48))
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_POINT = pa.struct([("x", _FLOAT), ("y", _FLOAT)])
_BOX = pa.struct([(name, _FLOAT) for name in ("x0", "y0", "x1", "y1")])
_QA = pa.struct([("question", pa.list_(_STRING)), ("answer", pa.list_(_STRING))])

CAP_SCHEMA = pa.schema([("image_url", _STRING), ("caption", _STRING), ("transcripts", pa.list_(_STRING))])
POINTS_SCHEMA = pa.schema(
    [
        ("image_url", _STRING),
        ("image_sha256", _STRING),
        ("points", pa.list_(_POINT)),
        ("count", _INT),
        ("label", _STRING),
        ("collection_method", _STRING),
    ]
)
POINTS_TEST_SCHEMA = POINTS_SCHEMA.append(pa.field("boxes", pa.list_(_BOX)))  # boxes in percent for `points_in_boxes`
COUNT_SCHEMA = pa.schema(
    [
        ("image_url", _STRING),
        ("image_sha256", _STRING),
        ("count", pa.int32()),
        ("points", pa.struct([("x", pa.list_(pa.float32())), ("y", pa.list_(pa.float32()))])),
        ("label", _STRING),
    ]
)
COUNT_TEST_SCHEMA = COUNT_SCHEMA.append(pa.field("boxes", pa.list_(_BOX)))  # boxes in percent for `points_in_boxes`
IMAGE_QA_SCHEMA = pa.schema(
    [
        ("id", _STRING),
        ("image", pa.struct([("bytes", pa.binary()), ("path", _STRING)])),
        ("qa_pairs", _QA),
    ]
)
MULTI_IMAGE_SCHEMA = pa.schema([("image_urls", pa.list_(_STRING)), ("qa_pairs", _QA)])
CHAT_SCHEMA = pa.schema(
    [
        ("id", _STRING),
        ("messages", pa.list_(pa.struct([("role", _STRING), ("content", _STRING)]))),
        ("source", _STRING),
        ("category", _STRING),
        ("first_message_qwen3_tokens", _INT),
        ("empty_messages", pa.bool_()),
        ("has_special_token", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoExample:
    """One example: rows of the parquet file, media files by path below the dataset's root, and the digits used.

    A row refers to a file as `file:PATH`, which the writer replaces by a URL.
    """

    rows: list[dict[str, Any]]
    digits: Sequence[int]
    files: dict[str, bytes] = field(default_factory=dict)


def one_of(rng: Generator, options: Sequence[Any]) -> Any:
    """A random element."""
    return options[int(rng.integers(len(options)))]


def portrait(rng: Generator, pool: Pool) -> tuple[Pixels, PlacedDigit]:
    """The smallest picture with one digit in one of its nine cells."""
    shape = SHAPES[0]
    (digit,) = scatter(rng, pool, shape, CELL, [list(range(10))])
    return draw(shape, [digit], int(rng.integers(30)), int(rng.integers(210, 256))), digit


def group(rng: Generator, pool: Pool, count: int, distinct: bool = False) -> tuple[Pixels, list[PlacedDigit]]:
    """A picture with `count` digits of one cell each; `distinct`: no two of the same class."""
    shape = one_of(rng, SHAPES)
    classes = [[int(c)] for c in rng.permutation(10)[:count]] if distinct else [list(range(10))] * count
    placed = scatter(rng, pool, shape, CELL, classes)
    return draw(shape, placed, int(rng.integers(30)), int(rng.integers(210, 256))), placed


def _numbers(placed: Sequence[PlacedDigit]) -> list[int]:
    return [digit.number for digit in placed]


def _where(digit: PlacedDigit, picture: Pixels) -> str:
    height, width = picture.shape[:2]
    return place_word(digit.center[0] / width, digit.center[1] / height)


def caption_of_digits(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """PixMo-Cap: a picture with one digit, a caption and the transcripts of two speakers.

    Captions are short on purpose: a model trained from scratch learns to use the picture sooner if a caption has few
    words that are always the same.
    """
    picture, digit = portrait(rng, pool)
    text = f"Digit {digit.label} at the {_where(digit, picture)}."
    transcripts = [f"I see {digit.label}.", f"{NUMBER_WORDS[digit.label]}."]
    path = f"images/{name}.png"
    row = {"image_url": f"file:{path}", "caption": text, "transcripts": transcripts}
    return DemoExample(rows=[row], digits=[digit.number], files={path: png(picture)})


def _point_rows(picture: Pixels, path: str, groups: Sequence[tuple[str, list[PlacedDigit]]]) -> list[dict[str, Any]]:
    """A row for each group, which is a label and its digits."""
    height, width = picture.shape[:2]
    sha256 = hashlib.sha256(png(picture)).hexdigest()
    return [
        {
            "image_url": f"file:{path}",
            "image_sha256": sha256,
            "points": [{"x": 100 * d.center[0] / width, "y": 100 * d.center[1] / height} for d in digits],
            "count": len(digits),
            "label": label,
            "collection_method": "counting" if label == "digits" else "pointing",
        }
        for label, digits in groups
    ]


def _box(digit: PlacedDigit, picture: Pixels) -> dict[str, float]:
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = digit.box
    return {"x0": 100 * x0 / width, "y0": 100 * y0 / height, "x1": 100 * x1 / width, "y1": 100 * y1 / height}


def points(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """PixMo-Points: a row for each of two to four digits, all of different classes; points in percent.

    There is never a single digit, since a model can point at it without reading it and would learn that first.
    """
    picture, placed = group(rng, pool, int(rng.integers(2, 5)), distinct=True)
    classes = rng.permutation([digit.label for digit in placed])
    groups = [(f"digit {c}", [digit for digit in placed if digit.label == c]) for c in classes]
    path = f"images/{name}.png"
    rows = _point_rows(picture, path, groups)
    return DemoExample(rows=rows, digits=_numbers(placed), files={path: png(picture)})


def points_test(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """A test of pointing: one to three digits of different classes, a question for one, and its box in percent."""
    picture, placed = group(rng, pool, int(rng.integers(1, 4)), distinct=True)
    digit = one_of(rng, placed)
    path = f"images/{name}.png"
    rows = _point_rows(picture, path, [(f"digit {digit.label}", [digit])])
    rows[0]["boxes"] = [_box(digit, picture)]
    return DemoExample(rows=rows, digits=_numbers(placed), files={path: png(picture)})


def _count(picture: Pixels, placed: Sequence[PlacedDigit], name: str) -> DemoExample:
    data = png(picture)
    path = f"images/{name}.png"
    row = {
        "image_url": f"file:{path}",
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "count": len(placed),
        "points": {"x": [d.center[0] for d in placed], "y": [d.center[1] for d in placed]},
        "label": "digits",
    }
    return DemoExample(rows=[row], digits=_numbers(placed), files={path: data})


def count(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """PixMo-Count: a picture with one to six digits and a point at each, in pixels."""
    return _count(*group(rng, pool, int(rng.integers(1, 7))), name)


def count_test(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """A test of counting: as `count`, with the digits' boxes."""
    picture, placed = group(rng, pool, int(rng.integers(1, 7)))
    example = _count(picture, placed, name)
    example.rows[0]["boxes"] = [_box(digit, picture) for digit in placed]
    return example


WHICH = "Which digit is this?"


def image_qa_rows(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """A picture (embedded JPEG) of one digit with three questions; the first one asks which digit it is."""
    picture, digit = portrait(rng, pool)
    others = [
        ("Is the digit even or odd?", "even" if digit.label % 2 == 0 else "odd"),
        ("Where is the digit?", _where(digit, picture)),
        ("Which digit comes next?", str((digit.label + 1) % 10)),
        ("What is the digit as a word?", NUMBER_WORDS[digit.label]),
    ]
    pairs = [(WHICH, str(digit.label))] + [others[i] for i in rng.permutation(len(others))[:2]]
    row = {
        "id": name,
        "image": {"bytes": jpeg(picture), "path": f"{name}.jpg"},
        "qa_pairs": {"question": [q for q, _ in pairs], "answer": [a for _, a in pairs]},
    }
    return DemoExample(rows=[row], digits=[digit.number])


def image_qa_test(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """A test of reading: as `image_qa`, with only the first question, for which chance is one in ten."""
    example = image_qa_rows(rng, pool, name)
    row = example.rows[0]
    row["qa_pairs"] = {key: values[:1] for key, values in row["qa_pairs"].items()}
    return example


def multi_image_qa(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """Molmo2-MultiImageQA: two or three pictures of one digit each, two questions across them."""
    pairs = [portrait(rng, pool) for _ in range(int(rng.integers(2, 4)))]
    labels = [digit.label for _, digit in pairs]
    paths = [f"images/{name}-{i}.png" for i in range(len(pairs))]
    number = int(rng.integers(len(pairs)))
    questions = [
        (f"Which digit is in image {number + 1}?", str(labels[number])),
        ("Which digits are shown, in order?", " ".join(map(str, labels))),
        ("What is the largest digit in these images?", str(max(labels))),
    ]
    chosen = [questions[i] for i in rng.permutation(len(questions))[:2]]
    row = {
        "image_urls": [f"file:{path}" for path in paths],
        "qa_pairs": {"question": [q for q, _ in chosen], "answer": [a for _, a in chosen]},
    }
    files = {path: png(picture) for path, (picture, _) in zip(paths, pairs, strict=True)}
    return DemoExample(rows=[row], digits=[digit.number for _, digit in pairs], files=files)


def _chat_turn(rng: Generator) -> tuple[str, str]:
    a, b = int(rng.integers(1, 10)), int(rng.integers(10))
    if a == b:
        b = (b + 1) % 10
    return one_of(
        rng,
        (
            (f"Which digit comes after {a - 1}?", f"{a}"),
            (f"Which digit comes before {a}?", f"{a - 1}"),
            (f"Is {a} even or odd?", "even" if a % 2 == 0 else "odd"),
            (f"Write {a} as a word.", NUMBER_WORDS[a]),
            (f"Which is larger, {a} or {b}?", f"{max(a, b)}"),
            (f"Count from {min(a, b)} to {max(a, b)}.", " ".join(map(str, range(min(a, b), max(a, b) + 1)))),
        ),
    )


def chat_rows(rng: Generator, pool: Pool, name: str) -> DemoExample:
    """Tulu-like conversations of one to three turns; some rows carry the flags that the converter must drop."""
    turns = [_chat_turn(rng) for _ in range(int(rng.integers(1, 4)))]
    messages = [
        {"role": role, "content": t} for turn in turns for role, t in zip(("user", "assistant"), turn, strict=True)
    ]
    row = {
        "id": name,
        "messages": messages,
        "source": "digits",
        "category": "code" if rng.random() < 0.02 else "math",
        "first_message_qwen3_tokens": len(turns[0][0].split()) * 2,
        "empty_messages": False,
        "has_special_token": bool(rng.random() < 0.02),
    }
    return DemoExample(rows=[row], digits=())
