"""Video benchmarks: their files in the published layout with made-up content, and answers with their scores."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


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


CASES = {
    "perception-test": (perception_test, [("no", 1.0), ("A", 0.0)]),
    "next-qa": (next_qa, [("D. chased", 1.0)]),
}
