"""Pointing benchmarks: their files in the published layout with made-up content, and answers with their scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from published_images import picture


def pixmo_points_eval(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / "1.png").write_bytes(picture())
    left, right = np.zeros((2, 60, 80), bool)
    left[10:20, 10:20] = right[:, 70:] = True
    row = {"image_url": f"file://{folder}/1.png", "image_sha256": None, "label": "dogs",
           "points": [{"x": 18.0, "y": 25.0}, {"x": 95.0, "y": 50.0}],
           "masks": [left.tolist(), right.tolist()]}  # fmt: skip
    schema = pa.schema(
        {
            "image_url": pa.string(),
            "image_sha256": pa.string(),
            "label": pa.string(),
            "points": pa.list_(pa.struct({"x": pa.float64(), "y": pa.float64()})),
            "masks": pa.list_(pa.list_(pa.list_(pa.bool_()))),
        }
    )
    pq.write_table(pa.Table.from_pylist([row], schema), folder / "data/test-00000-of-00001.parquet")


def point_bench(folder: Path) -> None:
    for name in ("selected_images", "selected_masks"):
        (folder / name / "spatial").mkdir(parents=True)
    (folder / "selected_images/spatial/a.jpg").write_bytes(picture())
    mask = np.full((60, 80), 100, np.uint8)  # not more than half: outside
    mask[:30] = 255
    Image.fromarray(mask).save(folder / "selected_masks/spatial/a.png")
    row = {"image_filename": "a.jpg", "category": "spatial", "user_input": "Point to what lies highest."}
    rows = [row | {"mask_filename": "a.png"}, row | {"mask_filename": None}]
    (folder / "data.json").write_text(json.dumps(rows))


TWO = '<points coords="1 1 180 250 2 950 500">dogs</points>'
LOW = '<points coords="1 1 500 900">it</points>'
CASES = {
    "pixmo-points-eval": (pixmo_points_eval, [(TWO, 1.0)]),
    "point-bench": (point_bench, [(LOW, 0.0)]),
}
