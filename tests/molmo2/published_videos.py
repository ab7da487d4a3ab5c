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


def videos(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not read here")


def table(folder: Path, file: str, rows: list[dict[str, object]]) -> None:
    """A file of rows, in the format of its suffix."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def mvbench(folder: Path) -> None:
    videos(folder, "video/perception/videos/video_8.mp4")
    (folder / "video/tvqa/frames_fps3_hq/castle_s08").mkdir(parents=True)
    same = {"question": "What happened?", "candidates": ["It fell.", "It flew."], "answer": "It flew."}
    table(folder, "json/action_count.json", [{"video": "video_8.mp4", **same}])
    table(folder, "json/episodic_reasoning.json", [{"video": "castle_s08", "start": 1.5, "end": 9.0, **same}])


def tomato(folder: Path) -> None:
    videos(folder, "videos/human/0101-0.mp4")
    row = {"question": "Which way?", "demonstration_type": "human", "motion_type": "rotation", "key": "0101-0",
           "answer": 2, "options": ["left", "right", "up"]}  # fmt: skip
    (folder / "data").mkdir()
    (folder / "data/rotation.json").write_text(json.dumps({"1": row}))


def asked_in_lines(letter: str) -> dict[str, str]:
    return {"uid": "1", "question": "What does he do?\n(A) walk\n(B) run\n(C) stand", "answer": letter}


def motion_bench(folder: Path) -> None:
    videos(folder, "MotionBench/self-collected/a.mp4")
    qa = [asked_in_lines("B"), asked_in_lines("NA")]
    table(folder, "MotionBench/video_info.meta.jsonl", [{"video_path": "a.mp4", "key": "a", "qa": qa}])


def lvbench(folder: Path) -> None:
    videos(folder, "videos/Cm73ma6Ibcs.mp4")
    row = {"key": "Cm73ma6Ibcs", "type": "sport", "qa": [asked_in_lines("C"), asked_in_lines("A")]}
    table(folder, "video_info.meta.jsonl", [row])


def temp_compass(folder: Path) -> None:
    videos(folder, "videos/1021.mp4")
    asked = {
        "caption_matching": ("Which one fits?\nCaption A: It falls.\nCaption B: It flies.", "Caption B: It flies."),
        "multi-choice": ("What is it doing?\nA. falling\nB. flying", "A. falling"),
        "yes_no": ("Does it fall?", "no"),
    }
    for task, (question, answer) in asked.items():
        row = {"video_id": "1021", "question": question, "answer": answer, "dim": "action"}
        table(folder, f"{task}/test-00000-of-00001.parquet", [row])


def temporal_bench(folder: Path) -> None:
    videos(folder, "short_video/Charades/a.mp4")
    question = "Which caption is right?\nA. He sits twice.\nB. He sits once.\nAnswer with the letter directly."
    row = {"idx": "0", "video_name": "short_video/Charades/a.mp4", "question": question, "GT": "B"}
    table(folder, "temporalbench_short_qa.json", [row])


def ego_schema(folder: Path) -> None:
    videos(folder, "videos/ab-1.mp4")
    row = {"question_idx": "0", "video_idx": "ab-1", "question": "What is C doing?", "answer": "1",
           "option": ["A. cooking", "B. knitting"]}  # fmt: skip
    table(folder, "Subset/test-00000-of-00001.parquet", [row])


def video_mme(folder: Path) -> None:
    videos(folder, "data/fFjv93ACGo8.mp4")
    same = {"video_id": "001", "videoID": "fFjv93ACGo8", "duration": "short", "options": ["A. apples", "B. candles"]}
    rows = [{**same, "question_id": "001-1", "question": "What is on the tree?", "answer": "A"},
            {**same, "question_id": "001-2", "question": "What is lit?", "answer": "B"}]  # fmt: skip
    table(folder, "videomme/test-00000-of-00001.parquet", rows)


def long_video_bench(folder: Path) -> None:
    videos(folder, "videos/86CxyhFV9MI.mp4")
    row = {"id": "86CxyhFV9MI_0", "video_id": "86CxyhFV9MI", "video_path": "86CxyhFV9MI.mp4", "duration": 190.2,
           "question": "Who comes in?", "candidates": ["a man", "a dog", "nobody"], "correct_choice": 1,
           "duration_group": 600, "subtitle_path": "86CxyhFV9MI_en.json"}  # fmt: skip
    table(folder, "lvb_val.json", [row])


def mlvu(folder: Path) -> None:
    videos(folder, "MLVU/video/1_plotQA/movie101_66.mp4", "MLVU/video/8_sub_scene/217.mp4")
    row = {"video": "movie101_66.mp4", "duration": 480.0, "question": "What colour is the coat?",
           "candidates": ["Red", "Blue"], "answer": "Blue", "question_type": "plotQA"}  # fmt: skip
    table(folder, "MLVU/json/1_plotQA.json", [row])
    free = {"video": "217.mp4", "duration": 300.0, "question": "Tell the scene.", "answer": "A dog runs."}
    table(folder, "MLVU/json/8_sub_scene.json", [free])


def video_eval_pro(folder: Path) -> None:
    videos(folder, "videos/videos_filtered/a.mp4")
    row = {"video": "a.mp4", "question": "What is it?", "options": ["A. one", "B. two"], "answer": "B",
           "answer_text": "two", "source": "mlvu", "qa_type": "Local Perception"}  # fmt: skip
    table(folder, "data/test-00000-of-00001.parquet", [row])


def cap_eval(folder: Path) -> None:
    videos(folder, "vimeo/vimeo_videos/vimeo_55.mp4", "ego4d/ab-2.mp4")
    same = {"atomic_statements": ["A dog runs."], "statement_categories": ["action"], "duration": 9.0}
    same["aggregated_caption"] = "A dog runs on grass."
    rows = [{"video_id": "55", "source": "vimeo", "video_start": None, "video_end": None, **same},
            {"video_id": "ab-2", "source": "ego4d", "video_start": 1.0, "video_end": 3.0, **same}]  # fmt: skip
    table(folder, "data/test-00000-of-00001.parquet", rows)


CASES = {
    "mvbench": (mvbench, [("B. It flew.", 1.0), ("A", 0.0)]),
    "tomato": (tomato, [("C. up", 1.0)]),
    "motion-bench": (motion_bench, [("B. run", 1.0)]),
    "lvbench": (lvbench, [("stand", 1.0), ("B", 0.0)]),
    "temp-compass": (temp_compass, [("B. It flies.", 1.0), ("B", 0.0), ("No.", 1.0)]),
    "temporal-bench": (temporal_bench, [("A", 0.0)]),
    "ego-schema": (ego_schema, [("B. knitting", 1.0)]),
    "video-mme": (video_mme, [("A. apples", 1.0), ("A", 0.0)]),
    "long-video-bench": (long_video_bench, [("B", 1.0)]),
    "mlvu": (mlvu, [("Red", 0.0)]),
    "video-eval-pro": (video_eval_pro, [("B. two", 1.0)]),
    "molmo2-cap-eval": (cap_eval, [("A dog runs on grass.", 1.0), ("", 0.0)]),
    "perception-test": (perception_test, [("no", 1.0), ("A", 0.0)]),
    "next-qa": (next_qa, [("D. chased", 1.0)]),
}
