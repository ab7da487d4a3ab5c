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


def messages(folder: Path, split: str, image: str, questions: list[dict[str, object]], **columns: object) -> None:
    """A file of the sets that Molmo2's authors have put on the Hub: a row for each image, its questions in a list."""
    (folder / split).mkdir(parents=True)
    (folder / image).parent.mkdir(parents=True)
    (folder / image).write_bytes(picture())
    row = {"image": image, "message_list": questions, **columns}
    pq.write_table(pa.Table.from_pylist([row]), folder / split / "0.parquet")


def vqa_v2(folder: Path) -> None:
    questions = [
        {"question": "Is it grey?", "answers": ["yes"] * 6 + ["no"] * 4},
        {"question": "What is it?", "answers": ["a wall"] * 2 + ["road"] * 8},
    ]
    messages(folder, "validation", "images/coco/val2014/1.jpg", questions)


def text_vqa(folder: Path) -> None:
    questions = [{"question": "what does it say?", "answers": ["stop"] * 10}]
    messages(folder, "validation", "text_vqa/train_images/1.jpg", questions)


def a_okvqa_direct(folder: Path) -> None:
    question = {"question": "What is grey?", "choices": ["sky"], "answer_idx": 0, "direct_answers": ["wall", "wall"]}
    messages(folder, "val", "images/coco/val2017/1.jpg", [question], difficult_direct_answer=False)


def ai2d(folder: Path) -> None:
    for name in ("questions", "annotations", "images"):
        (folder / "ai2d" / name).mkdir(parents=True)
    (folder / "ai2d_test_ids.csv").write_text("7\n9\n")
    text = {"T0": {"rectangle": [[5, 5], [20, 20]], "replacementText": "A", "value": "leaf"}}
    for name in ("7.png", "8.png"):  # the second is no test image
        (folder / "ai2d/images" / name).write_bytes(picture())
        (folder / f"ai2d/annotations/{name}.json").write_text(json.dumps({"text": text}))
        question = {"abcLabel": False, "answerTexts": ["leaf", "root"], "correctAnswer": 1, "questionId": f"{name}-0"}
        document = {"imageName": name, "questions": {"What drinks water?": question}}
        (folder / f"ai2d/questions/{name}.json").write_text(json.dumps(document))


def embedded(folder: Path, file: str, rows: list[dict[str, object]]) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / file)


def image(there: bool = True) -> dict[str, object] | None:
    return {"bytes": picture(), "path": None} if there else None


def numbered(there: int, of: int) -> dict[str, object]:
    return {f"image_{number}": image(number <= there) for number in range(1, of + 1)}


def mmmu(folder: Path) -> None:
    choice = {"id": "validation_Art_1", "question": "Which is older, <image 1> or <image 2>?", "answer": "B",
              "options": "['<image 1>', \"both aren't\"]", "question_type": "multiple-choice"}  # fmt: skip
    free = {"id": "validation_Math_3", "question": "How long is x in <image 1>?", "answer": "['12', '12.0']",
            "options": "[]", "question_type": "open"}  # fmt: skip
    embedded(folder, "Art/validation-00000-of-00001.parquet", [choice | numbered(2, 7)])
    embedded(folder, "Math/validation-00000-of-00001.parquet", [free | numbered(1, 7)])


def real_world_qa(folder: Path) -> None:
    choice = (
        "Where does the car go?\n\nA. Left\nB. Right\n"
        "Please answer directly with only the letter of the correct option and nothing else."
    )
    free = "How many lanes are there?\nPlease answer directly with a single word or number."
    rows = [
        {"image": image(), "question": choice, "answer": "B"},
        {"image": image(), "question": free, "answer": "2"},
    ]
    embedded(folder, "data/test-00000-of-00002.parquet", rows)


def math_vista(folder: Path) -> None:
    same = {"image": "images/1.jpg", "decoded_image": image()}
    choice = {"pid": "1", "question": "Which is longer?", "answer": "AB", "choices": ["AB", "BC"], "precision": None,
              "question_type": "multi_choice", "answer_type": "text"}  # fmt: skip
    free = {"pid": "2", "question": "How long is AB?", "answer": "1.2", "choices": None, "precision": 1.0,
            "question_type": "free_form", "answer_type": "float"}  # fmt: skip
    embedded(folder, "data/testmini-00000-of-00001.parquet", [same | choice, same | free])


def pixmo_count(folder: Path) -> None:
    (folder / "1.png").parent.mkdir(parents=True, exist_ok=True)
    (folder / "1.png").write_bytes(picture())
    row = {"image_url": f"file://{folder}/1.png", "image_sha256": "not checked", "count": 5, "label": "dogs"}
    embedded(folder, "data/validation-00000-of-00001.parquet", [row])


def count_bench_qa(folder: Path) -> None:
    rows = [{"image": None, "number": 3, "image_url": "gone"}, {"image": image(), "number": 8, "image_url": "there"}]
    embedded(folder, "data/train-00000-of-00001-cf54c241ba947306.parquet", rows)
    questions = [{"question": "How many cups are there?"}, {"question": "How many candles are on the cake?"}]
    (folder / "questions.json").write_text(json.dumps(questions))


def muir_bench(folder: Path) -> None:
    row = {"idx": "3", "task": "Difference", "question": "Which differs from <image>?", "answer": "B",
           "options": ["<image>", "<image>", "none"], "image_list": [image()] * 3}  # fmt: skip
    embedded(folder, "data/test-00000-of-00001.parquet", [row])


def mmiu(folder: Path) -> None:
    (folder / "2D-spatial/pose").mkdir(parents=True)
    for number in (0, 1):
        (folder / f"2D-spatial/pose/{number}.jpg").write_bytes(picture())
    row = {"task": "pose", "question": "Where is the hand?", "context": "Your task is ...", "output": "C",
           "options": "A: (1, 2)\nB: (3, 4)\nC: (5, 6)\nD: nowhere", "visual_input_component": "natural image",
           "input_image_path": ["./2D-spatial/pose/0.jpg", "./2D-spatial/pose/1.jpg"]}  # fmt: skip
    embedded(folder, "all.parquet", [row])


def blink(folder: Path) -> None:
    prompt = "Which image is farther?\nSelect from the following choices.\n(A) the first\n(B) the second"
    row = {"idx": "val_Depth_1", "sub_task": "Depth", "prompt": prompt, "answer": "(A)",
           "choices": ["the first", "the second"]}  # fmt: skip
    embedded(folder, "Relative_Depth/val-00000-of-00001.parquet", [row | numbered(2, 4)])


CASES = {
    "vqa-v2": (vqa_v2, [("Yes", 1.0), ("the wall", 0.6)]),  # of ten people two said so, of nine others one or two
    "text-vqa": (text_vqa, [("go", 0.0)]),
    "a-okvqa-da": (a_okvqa_direct, [("wall", 2 / 3)]),
    "ai2d": (ai2d, [("B", 1.0)]),
    "mmmu": (mmmu, [("B. both aren't", 1.0), ("12", 1.0)]),
    "real-world-qa": (real_world_qa, [("B. Right", 1.0), ("3", 0.0)]),
    "math-vista": (math_vista, [("BC", 0.0), ("1.21", 1.0)]),
    "pixmo-count": (pixmo_count, [("There are 5 dogs.", 1.0)]),
    "count-bench-qa": (count_bench_qa, [("7", 0.0)]),
    "muir-bench": (muir_bench, [("B. Image 3", 1.0)]),
    "mmiu": (mmiu, [("C", 1.0)]),
    "blink": (blink, [("B. the second", 0.0)]),
    "chart-qa": (chart_qa, [("41", 1.0), ("Sweden", 0.0)]),  # 41 is within 5 % of 40
    "doc-qa": (doc_qa, [("May 12, 1998", 1.0)]),
    "info-qa": (info_qa, [("64%", 2 / 3)]),  # one of three characters is another
    "a-okvqa": (a_okvqa, [("B", 1.0)]),
}
