"""Image benchmarks: their files in the published layout with made-up content, and answers with their scores."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chart_qa(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    image = {"bytes": picture(), "path": None}
    rows = [
        {"image": image, "query": "How many bars are red?", "label": ["40"], "human_or_machine": 0},
        {"image": image, "query": "Which bar is tallest?", "label": ["Norway"], "human_or_machine": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/val-00000-of-00001.parquet")


def doc_qa(folder: Path) -> None:
    (folder / "documents").mkdir(parents=True)
    (folder / "documents/a_1.png").write_bytes(picture())
    record = {"questionId": 7, "question": "What is the date?", "image": "documents/a_1.png", "docId": 3,
              "answers": ["12 May 1998", "May 12, 1998"], "data_split": "val", "question_types": ["form"]}  # fmt: skip
    (folder / "val_v1.0_withQT.json").write_text(json.dumps({"dataset_name": "made up", "data": [record]}))


def info_qa(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "images/30001.jpeg").write_bytes(picture())
    record = {"questionId": 9, "question": "Which share is online?", "image_local_name": "30001.jpeg",
              "answers": ["63%", "63 percent"], "data_split": "val"}  # fmt: skip
    (folder / "infographicsVQA_val_v1.0_withQT.json").write_text(json.dumps({"data": [record]}))


def a_okvqa(folder: Path) -> None:
    (folder / "val").mkdir(parents=True)
    (folder / "images/coco/val2017").mkdir(parents=True)
    (folder / "images/coco/val2017/000000000139.jpg").write_bytes(picture())
    question = {"question": "What is grey?", "question_id": "q1", "choices": ["sky", "wall", "sea", "road"],
                "answer_idx": 1, "direct_answers": ["wall"] * 10}  # fmt: skip
    row = {"image": "images/coco/val2017/000000000139.jpg", "message_list": [question]}
    pq.write_table(pa.Table.from_pylist([row]), folder / "val/0.parquet")


CASES = {
    "chart-qa": (chart_qa, [("41", 1.0), ("Sweden", 0.0)]),  # 41 is within 5 % of 40
    "doc-qa": (doc_qa, [("May 12, 1998", 1.0)]),
    "info-qa": (info_qa, [("64%", 2 / 3)]),  # one of three characters is another
    "a-okvqa": (a_okvqa, [("B", 1.0)]),
}
