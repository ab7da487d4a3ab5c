"""The ten datasets of the demo by name, and the functions that write them to disk.

raw/<set>/data/<split>-00000-of-00001.parquet    rows in the layout of the imitated dataset
raw/<set>/images, raw/<set>/videos               media files
raw/<set>/made.json                              settings and digits used; written last, to mark a set as complete
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from molmo2.demo import video_sets as videos
from molmo2.demo.digits import Generator, Pool, generator, load_pool
from molmo2.demo.image_sets import (
    CAP_SCHEMA,
    CHAT_SCHEMA,
    COUNT_SCHEMA,
    COUNT_TEST_SCHEMA,
    IMAGE_QA_SCHEMA,
    MULTI_IMAGE_SCHEMA,
    POINTS_SCHEMA,
    POINTS_TEST_SCHEMA,
    DemoExample,
    caption_of_digits,
    chat_rows,
    count,
    count_test,
    image_qa_rows,
    image_qa_test,
    multi_image_qa,
    points,
    points_test,
)
from molmo2.processing.contract import templates
from molmo2.processing.points import SEPARATORS, format_points
from shards.atomic import replacing, write_atomic
from shards.schema import PointGroup

VERSION = 6  # increase it when the drawing changes: data of another version are made again
Maker = Callable[[Generator, Pool, str], DemoExample]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSet:
    """One set: numbers of examples (pictures, clips, conversations) by split, columns, and the functions for them."""

    name: str
    schema: pa.Schema
    make: Maker
    train: int
    validation: int = 0
    make_validation: Maker | None = None
    schema_validation: pa.Schema | None = None

    def size(self, split: str, scale: float) -> int:
        """Number of examples of a split, at least four if it has any."""
        full = self.train if split == "train" else self.validation
        return max(4, round(full * scale)) if full else 0

    def maker(self, split: str) -> Maker:
        """The function that makes an example of `split`."""
        return self.make_validation if split == "validation" and self.make_validation else self.make

    def columns(self, split: str) -> pa.Schema:
        """Columns of the parquet file of `split`."""
        return self.schema_validation if split == "validation" and self.schema_validation else self.schema


SETS = (
    DemoSet(name="demo-cap", schema=CAP_SCHEMA, make=caption_of_digits, train=3000),
    DemoSet(
        name="demo-points",
        schema=POINTS_SCHEMA,
        schema_validation=POINTS_TEST_SCHEMA,
        make=points,
        make_validation=points_test,
        train=2500,
        validation=200,
    ),
    DemoSet(
        name="demo-count",
        schema=COUNT_SCHEMA,
        schema_validation=COUNT_TEST_SCHEMA,
        make=count,
        make_validation=count_test,
        train=2500,
        validation=200,
    ),
    DemoSet(
        name="demo-image-qa",
        schema=IMAGE_QA_SCHEMA,
        make=image_qa_rows,
        train=3000,
        validation=350,
        make_validation=image_qa_test,
    ),
    DemoSet(name="demo-multi-image-qa", schema=MULTI_IMAGE_SCHEMA, make=multi_image_qa, train=800),
    DemoSet(name="demo-chat", schema=CHAT_SCHEMA, make=chat_rows, train=800),
    DemoSet(name="demo-video-cap", schema=videos.CAP_SCHEMA, make=videos.caption_of_clip, train=250),
    DemoSet(name="demo-video-qa", schema=videos.QA_SCHEMA, make=videos.qa, train=1200, validation=150),
    DemoSet(name="demo-video-point", schema=videos.POINT_SCHEMA, make=videos.point, train=250),
    DemoSet(name="demo-video-track", schema=videos.TRACK_SCHEMA, make=videos.track, train=200),
)
SPLITS = ("train", "validation")


def make_example(demo: DemoSet, split: str, number: int, pool: Pool, seed: int) -> DemoExample:
    """Make example `number` of a split; it depends only on the arguments."""
    name = f"{'v' if split == 'validation' else ''}{number:05d}"
    return demo.maker(split)(generator(VERSION, seed, demo.name, split, number), pool, name)


def _resolve(value: Any, root: Path) -> Any:
    """Replace the makers' `file:PATH` by a file:// URL below `root`."""
    if isinstance(value, str) and value.startswith("file:"):
        return (root / value.removeprefix("file:")).as_uri()
    return [_resolve(item, root) for item in value] if isinstance(value, list) else value


def write_split(demo: DemoSet, split: str, made: Iterable[DemoExample], root: Path) -> list[int]:
    """Write media and parquet of one split below `root`, and return the sorted digits that were used."""
    rows: list[dict[str, Any]] = []
    digits: set[int] = set()
    for folder in ("images", "videos", "data"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for example in made:
        for path, data in example.files.items():
            (root / path).write_bytes(data)
        rows += [{key: _resolve(value, root) for key, value in row.items()} for row in example.rows]
        digits.update(example.digits)
    target = root / "data" / f"{split}-00000-of-00001.parquet"
    with replacing(target) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, demo.columns(split)), temporary)
    return sorted(digits)


def settings(demo: DemoSet, seed: int, scale: float, root: Path) -> dict[str, Any]:
    """The settings that determine the bytes of a set; a set with equal settings in `made.json` is complete."""
    sizes = {split: demo.size(split, scale) for split in SPLITS}
    return {"version": VERSION, "seed": seed, "sizes": sizes, "root": str(root)}


def is_complete(demo: DemoSet, raw: Path, seed: int, scale: float) -> bool:
    """Whether `raw` has the complete set with these settings."""
    root = raw.resolve() / demo.name
    try:
        mark = json.loads((root / "made.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return bool(mark["settings"] == settings(demo, seed, scale, root))


def make_set(
    demo: DemoSet,
    raw: Path,
    seed: int,
    scale: float,
    progress: Callable[[Iterable[DemoExample], int], Iterator[DemoExample]],
) -> None:
    """Make a set below `raw`, both splits, and mark it as complete. `progress` wraps the examples of a split."""
    root = raw.resolve() / demo.name
    (root / "made.json").unlink(missing_ok=True)
    used = {}
    for split in SPLITS:
        size = demo.size(split, scale)
        if size:
            pool = load_pool(split)
            made = (make_example(demo, split, number, pool, seed) for number in range(size))
            used[split] = write_split(demo, split, progress(made, size), root)
    mark = {"settings": settings(demo, seed, scale, root), "digits": used}
    write_atomic(root / "made.json", json.dumps(mark) + "\n")


def texts(raw: Path) -> Iterator[str]:
    """Yield the strings of the training splits, for training the tokenizer; URLs, ids and hashes are left out.

    It also yields the templates of pointing questions and the text of points, about as often as the training data will
    have them. Without tokens of their own they would be most of an answer's tokens.
    """
    for style in ("pointing", "point_count", "video_point", "video_point_count"):
        forms = templates()[style]
        for template in forms:
            yield from [template.format(label="digits")] * (2000 // len(forms))
    point = PointGroup(at=1, points=((0.5, 0.5),))
    yield from [format_points([point], "digits", seconds=False, separator=SEPARATORS["html-v2"])] * 5000
    yield from ["Counting the shows a total of"] * 1000
    for demo in SETS:
        table = pq.read_table(raw / demo.name / "data" / "train-00000-of-00001.parquet")
        skipped = {"image_url", "image_urls", "image_sha256", "id", "video_id", "video", "image", "mask_id", "source"}
        for name in table.column_names:
            if name not in skipped:
                yield from _strings(table[name].to_pylist())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
