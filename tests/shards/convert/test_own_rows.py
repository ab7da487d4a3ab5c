"""A user's files in published layouts, from a folder to a batch that is loaded."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_cases import factory
from catalog_cases import image, video

from shards.build.builder import build_dataset
from shards.catalog import Row, load_catalog
from shards.convert.layout_columns import UnsureError
from shards.convert.own_rows import OwnRow, find_rows, link_inputs
from shards.convert.reading import convert_or_reject, open_rows, read_groups, stage_groups
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, PlanSettings, open_plan

NUMBER = 8  # examples of every layout


def pictures(folder: Path, names: str = "{}.png") -> list[str]:
    """Pictures of different sizes in a folder; their names."""
    made = [names.format(number) for number in range(NUMBER)]
    for number, name in enumerate(made):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(f"{60 + number}x40:red"))
    return made


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sharegpt(folder: Path) -> None:
    rows = [{"id": str(n), "conversations": turns(f"What is {n}?", f"{n}, a number.")} for n in range(NUMBER)]
    (folder / "sharegpt.json").write_text(json.dumps(rows))


def llava(folder: Path) -> None:
    names = pictures(folder, "images/coco/train2017/{:012d}.png")
    values = [name.removeprefix("images/") for name in names]
    rows = [{"id": value, "image": value, "conversations": turns("<image>\nColour?", "Red.")} for value in values]
    (folder / "llava_instruct_150k.json").write_text(json.dumps(rows))


def ms_swift(folder: Path) -> None:
    names = [str(folder / name) for name in pictures(folder)]
    messages = [{"role": "user", "content": "<image>Colour?"}, {"role": "assistant", "content": "Red."}]
    write_lines(folder / "train.jsonl", [{"messages": messages, "images": [name]} for name in names])


def openai(folder: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
        parts = [{"type": "text", "text": "Colour?"}, {"type": "image_url", "image_url": {"url": url}}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}

    write_lines(folder / "chat.jsonl", [row(name) for name in pictures(folder)])


def parquet(folder: Path) -> None:
    """A dataset of the hub with embedded pictures and a split for validation."""
    names = pictures(folder / "source")
    table = pa.table(
        {
            "image": [{"bytes": (folder / "source" / name).read_bytes(), "path": name} for name in names],
            "question": ["Colour?"] * NUMBER,
            "answer": ["red"] * NUMBER,
        }
    )
    (folder / "data").mkdir()
    for split, part in (("train", table), ("validation", table.slice(0, 3))):
        pq.write_table(part, folder / f"data/{split}-00000-of-00001.parquet")


def image_folder(folder: Path) -> None:
    names = pictures(folder / "train")
    write_lines(folder / "train/metadata.jsonl", [{"file_name": name, "text": "A red field."} for name in names])


def texts_beside(folder: Path) -> None:
    for name in pictures(folder):
        (folder / name).with_suffix(".txt").write_text("A red field.\n")


def class_folders(folder: Path) -> None:
    pictures(folder / "train/red_field")
    pictures(folder / "train/flag", "{}-b.png")
    pictures(folder / "val/flag", "{}-c.png")


def alpaca(folder: Path) -> None:
    rows = [{"instruction": "Say the number.", "input": str(n), "output": f"It is {n}."} for n in range(NUMBER)]
    (folder / "alpaca_data.json").write_text(json.dumps(rows))


def alpaca_with_pictures(folder: Path) -> None:
    names = pictures(folder)
    rows = [{"instruction": "Which colour?", "input": "One word.", "output": "Red.", "image": name} for name in names]
    (folder / "alpaca_data.json").write_text(json.dumps(rows))


def class_numbers(folder: Path) -> None:
    """A dataset of the hub with embedded pictures and numbers of classes, whose names are in the schema."""
    names = pictures(folder / ".source")
    columns = {
        "image": [{"bytes": (folder / ".source" / name).read_bytes(), "path": name} for name in names],
        "label": [number % 2 for number in range(NUMBER)],
    }
    features = {"image": {"_type": "Image"}, "label": {"names": ["red_field", "flag"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "train-00000-of-00001.parquet")


def class_numbers_in_arrow(folder: Path) -> None:
    class_numbers(folder)
    path = folder / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    path.unlink()


def options_from_one(folder: Path) -> None:
    names, options = pictures(folder), ["blue", "red", "green"]
    rows = [
        {"image": name, "question": "Colour?", "options": options, "answer": 1 + n % 3} for n, name in enumerate(names)
    ]
    write_lines(folder / "choices.jsonl", rows)


def csv_with_paths(folder: Path) -> None:
    names = pictures(folder, "pictures/{}.png")
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "label"), *((name, f"kind {n}") for n, name in enumerate(names))])


def coco(folder: Path) -> None:
    names = pictures(folder, "images/{}.png")
    document = {
        "images": [{"id": n, "file_name": name.removeprefix("images/")} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cross"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [10, 10, 20, 20]} for n in range(NUMBER)],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_train.json").write_text(json.dumps(document))


def videos(folder: Path) -> None:
    (folder / "clips").mkdir()
    rows = [("video", "question", "answer")]
    for number in range(NUMBER):
        (folder / f"clips/{number}.mp4").write_bytes(video(f"64x48:{10 + number}:10"))
        rows.append((f"clips/{number}.mp4", "What happens?", "It gets brighter."))
    with open(folder / "videos.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


# layout -> samples of training, converter, media
LAYOUTS = [
    (sharegpt, NUMBER, "chat"),
    (llava, NUMBER, "chat"),
    (ms_swift, NUMBER, "chat"),
    (openai, NUMBER, "chat"),
    (parquet, NUMBER + 3, "image_qa"),
    (image_folder, NUMBER, "image_caption"),
    (texts_beside, NUMBER, "image_caption"),
    (class_folders, 3 * NUMBER, "image_qa"),
    (csv_with_paths, NUMBER, "image_qa"),
    (alpaca, NUMBER, "chat"),
    (alpaca_with_pictures, NUMBER, "chat"),
    (class_numbers, NUMBER, "image_qa"),
    (class_numbers_in_arrow, NUMBER, "image_qa"),
    (options_from_one, NUMBER, "image_choice"),
    (coco, NUMBER, "image_points"),
    pytest.param(videos, NUMBER, "video_qa", marks=pytest.mark.slow),  # decoding starts a process
]


def found_in(folder: Path, tmp_path: Path, **answers: str) -> list[OwnRow]:
    raw = tmp_path / "raw/mine"
    return find_rows("mine", raw, link_inputs([folder], raw), answers).rows


@pytest.mark.parametrize(("write", "number", "converter"), LAYOUTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_layout_becomes_batches(
    raw: Path, tmp_path: Path, write: Callable[[Path], None], number: int, converter: str
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    write(folder)
    before = sorted(folder.rglob("*"))
    (own,) = found_in(folder, tmp_path)
    assert sorted(folder.rglob("*")) == before  # the user's folder stays as it is
    assert own.row["converter"] == converter
    assert own.num_train + own.num_held_out == number and own.num_held_out >= 1
    row = Row.model_validate(own.row)
    settings = load_catalog("demo").stages["sft"]
    for stage in ("sft", "eval"):
        out = tmp_path / stage / "mine"
        built = build_dataset(row, stage, settings, factory(raw, stage), raw=tmp_path / "raw/mine", out=out)
        assert built.index is not None and built.index.totals.rejects == 0
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"mine": None}}}})
    limits = PlanSettings(sequence_length=768, max_crops=32, packs_per_step=2, window=16)
    plan = open_plan([str(tmp_path / "sft")], mixture, limits)
    batch = next(make_loader(plan, Cursor(), factory(raw, "sft")().layout))
    assert float(batch.loss_weights.sum()) > 0 and (len(batch.pixels) > 0) == (own.layout.media != "text")


def test_media_in_another_folder_are_found_and_missing_ones_are_told(tmp_path: Path) -> None:
    tables, media = tmp_path / "tables", tmp_path / "media"
    names = pictures(media, "deep/{}.png")
    write_lines(tables / "qa.jsonl", [{"image": name, "question": "Colour?", "answer": "Red."} for name in names])
    raw = tmp_path / "raw/mine"
    with pytest.raises(ValueError, match=r"qa.jsonl: 'deep/0.png' is in none of tables/.*another PATH"):
        find_rows("mine", raw, link_inputs([tables / "qa.jsonl"], raw), {})
    (own,) = find_rows("mine", raw, link_inputs([tables / "qa.jsonl", media], raw), {}).rows
    assert own.row["media"] == "media/{value}" and own.row["metric"] == "exact_match"
    assert own.row["media_roots"] == sorted([str(media), str(tables)])
    with pytest.raises(ValueError, match="no such file or folder"):
        link_inputs([tmp_path / "nothing"], raw)
    with pytest.raises(ValueError, match="contains the raw folder"):
        link_inputs([tmp_path], raw)


def test_several_tables_are_several_rows_and_unknown_ones_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    names = pictures(folder)
    write_lines(folder / "a.jsonl", [{"image": name, "question": "Colour?", "answer": "Red."} for name in names])
    write_lines(folder / "b.jsonl", [{"image": n, "label": "cross", "points": [[30, 20]]} for n in names])
    with pytest.raises(UnsureError):
        found_in(folder, tmp_path)
    rows = found_in(folder, tmp_path, scale="pixel")
    assert [own.row["name"] for own in rows] == ["mine-a", "mine-b"]
    other = tmp_path / "other"
    write_lines(other / "x.jsonl", [{"colour": "red", "size": 3}])
    with pytest.raises(ValueError, match=r"no known layout \(1 files; columns of other/x.jsonl: colour, size\)"):
        found_in(other, tmp_path)
    pictures(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no known layout \(8 files; 8 pictures\)"):
        found_in(tmp_path / "bare", tmp_path)


def test_unknown_tables_beside_known_ones_are_named(tmp_path: Path) -> None:
    folder, raw = tmp_path / "given", tmp_path / "raw/mine"
    rows = [{"image": name, "question": "Colour?", "answer": "Red."} for name in pictures(folder)]
    write_lines(folder / "qa-train.jsonl", rows)
    write_lines(folder / "qa-val.jsonl", [{"colour": "red"}])
    write_lines(folder / "sizes.jsonl", [{"colour": "red", "size": 3}])
    found = find_rows("mine", raw, link_inputs([folder], raw), {})
    assert found.unknown == ["columns of given/qa-val.jsonl: colour", "columns of given/sizes.jsonl: colour, size"]
    (own,) = found.rows
    assert own.row["files"] == {"train": "given/qa-train.jsonl"} and own.num_held_out > 0


def test_the_right_class_and_option_are_trained(tmp_path: Path) -> None:
    answers = {}
    for write in (class_numbers, options_from_one):
        folder, raw = tmp_path / write.__name__, tmp_path / "raw" / write.__name__
        folder.mkdir()
        write(folder)
        (own,) = find_rows("mine", raw, link_inputs([folder], raw), {}).rows
        row = Row.model_validate({**own.row, "held_out": 0, "stages": ["sft"], "metric": None})
        table = open_rows(row, "sft", raw)
        groups = read_groups(row, "sft", raw, table, stage_groups(row, "sft", table))
        answers[write] = [item.annotations[0] for group in groups for item in convert_or_reject(group)]  # type: ignore[union-attr]
    assert [text.answer for text in answers[class_numbers]] == ["red field", "flag"] * (NUMBER // 2)  # type: ignore[union-attr]
    assert [choice.answer for choice in answers[options_from_one]] == [n % 3 for n in range(NUMBER)]  # type: ignore[union-attr]


def test_numbers_of_classes_without_names_end_the_command(tmp_path: Path) -> None:
    rows = [{"image": name, "label": 3} for name in pictures(tmp_path / "given")]
    write_lines(tmp_path / "given/labels.jsonl", rows)
    with pytest.raises(ValueError, match=r"given/labels.jsonl: column label holds numbers of classes \(3, ...\)"):
        found_in(tmp_path / "given", tmp_path)
