"""Rows of the catalog molmo2-eval, from files in their published layout to scored answers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo2.eval.benchmarks import SUITES
from molmo2.eval.runner import questions
from shards.catalog import load_catalog
from shards.schema import Choice, Text

ROWS = {row.name: row for row in load_catalog("molmo2-eval").rows}
BENCHMARKS = {each.dataset: each for suite in SUITES.values() for each in suite.benchmarks if each.dataset in ROWS}


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


def perception_test(folder: Path) -> None:
    (folder / "mc_question_val").mkdir(parents=True)
    (folder / "videos").mkdir()
    (folder / "videos/video_10.mp4").write_bytes(b"not read here")
    same = {"video_name": "video_10", "area": "physics", "reasoning": "descriptive"}
    rows = [
        {
            **same,
            "question_id": 1,
            "question": "Is the cup lifted?",
            "options": ["yes", "no", "unclear"],
            "answer_id": 1,
        },
        {**same, "question_id": 2, "question": "How many cups?", "options": ["1", "2", "3"], "answer_id": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mc_question_val/validation-00000-of-00001.parquet")


def next_qa(folder: Path) -> None:
    (folder / "NExTVideo-all-videos/0001").mkdir(parents=True)
    (folder / "NExTVideo-all-videos/0001/77.mp4").write_bytes(b"not read here")
    (folder / "map_vid_vidorID.json").write_text(json.dumps({"77": "0001/77"}))
    lines = ["video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4",
             "77,300,640,480,why did the boy run,3,6,CW,rain,tired,late,chased,fun"]  # fmt: skip
    (folder / "val.csv").write_text("\n".join(lines) + "\n")


CASES: dict[str, tuple[Any, list[tuple[str, float]]]] = {  # how its files are made; answers with their scores
    "chart-qa": (chart_qa, [("41", 1.0), ("Sweden", 0.0)]),  # 41 is within 5 % of 40
    "doc-qa": (doc_qa, [("May 12, 1998", 1.0)]),
    "a-okvqa": (a_okvqa, [("B", 1.0)]),
    "perception-test": (perception_test, [("no", 1.0), ("A", 0.0)]),
    "next-qa": (next_qa, [("D. chased", 1.0)]),
    "info-qa": (info_qa, [("64%", 2 / 3)]),  # one of three characters is another
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_files_become_scored_questions(name: str, tmp_path: Path) -> None:
    make, answers = CASES[name]
    make(tmp_path / ROWS[name].folder)
    benchmark = BENCHMARKS[name]
    asked = questions(ROWS[name], tmp_path, benchmark.columns)
    assert len(asked) == len(answers) and all(isinstance(question.asked, Text | Choice) for question in asked)
    for question, (answer, score) in zip(asked, answers, strict=True):
        assert benchmark.metric(answer, question.asked, question.row).value == pytest.approx(score)


def test_every_row_has_a_case_and_a_benchmark() -> None:
    assert set(ROWS) == set(CASES) == set(BENCHMARKS)
