import functools
import hashlib
import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from molmo2.demo.digits import generator, held_out, load_pool, place_word, scatter
from molmo2.demo.sets import SETS, is_complete, make_example, make_set, texts

SCALE = 0.004  # four to twelve examples of each set


def plain(made, total):
    return iter(made)


@functools.cache
def pools():
    return {split: load_pool(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "raw"
    for demo in SETS:
        make_set(demo, root, seed=0, scale=SCALE, progress=plain)
    return root


def rows_of(raw: Path, name: str, split: str = "train"):
    return pq.read_table(raw / name / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


@pytest.mark.slow
def test_split_is_by_digit_and_about_a_fifth():
    train, held = (set(pools()[split].number.tolist()) for split in ("train", "validation"))
    assert not train & held
    assert len(train | held) == 1797
    assert 0.17 < len(held) / 1797 < 0.23
    assert all(held_out(number) for number in held)
    assert set(pools()["validation"].label.tolist()) == set(range(10))


def test_no_held_out_digit_is_used_in_training(raw):
    held = set(pools()["validation"].number.tolist())
    seen = {"train": set(), "validation": set()}
    for demo in SETS:
        for split, digits in json.loads((raw / demo.name / "made.json").read_text())["digits"].items():
            seen[split] |= set(digits)
    assert seen["train"] and not seen["train"] & held
    assert seen["validation"] and seen["validation"] <= held


def test_makers_draw_only_from_the_pool_they_are_given():
    """The recorded digits are the truth: a pool of one digit per class leaves nothing else to draw."""
    pool = pools()["train"]
    first = np.array([int(np.flatnonzero(pool.label == label)[0]) for label in range(10)])
    small = type(pool)(pool.number[first], pool.label[first], pool.scan[first])
    for demo in SETS:
        for number in range(3):
            assert set(make_example(demo, "train", number, small, 0).digits) <= set(small.number.tolist())


@pytest.mark.parametrize("demo", SETS, ids=lambda demo: demo.name)
def test_files_have_the_columns_of_their_layout(raw, demo):
    for split, size in (("train", demo.train), ("validation", demo.validation)):
        path = raw / demo.name / "data" / f"{split}-00000-of-00001.parquet"
        assert path.exists() == (size > 0)
        if size:
            table = pq.read_table(path)
            assert table.schema.equals(demo.columns(split))
            assert len(table) >= demo.size(split, SCALE)


def test_urls_lead_to_the_files_and_hashes_agree(raw):
    for name in ("demo-cap", "demo-points", "demo-count"):
        for row in rows_of(raw, name):
            path = Path(row["image_url"].removeprefix("file://"))
            assert path.parent == raw.resolve() / name / "images"
            picture = np.asarray(Image.open(path))
            assert picture.shape[2] == 3 and all(side % 16 == 0 for side in picture.shape[:2])
            if "image_sha256" in row:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == row["image_sha256"]


def test_points_lie_on_ink(raw):
    """Percent in PixMo-Points, pixels in PixMo-Count: around each point the picture is bright."""
    for name, scale in (("demo-points", 100), ("demo-count", 1)):
        for row in rows_of(raw, name):
            picture = np.asarray(Image.open(row["image_url"].removeprefix("file://")))[..., 0].astype(int)
            height, width = picture.shape
            points = row["points"]
            if name == "demo-points":
                pairs = [(p["x"], p["y"]) for p in points]
            else:
                pairs = list(zip(points["x"], points["y"], strict=True))
            assert len(pairs) == row["count"]
            for x, y in pairs:
                x, y = (x * width / scale, y * height / scale) if scale == 100 else (x, y)
                around = picture[int(y) - 6 : int(y) + 6, int(x) - 6 : int(x) + 6]
                assert around.max() > picture.min() + 100


def test_pointing_test_has_one_box_with_the_point_inside(raw):
    for row in rows_of(raw, "demo-points", "validation"):
        (box,), (point,) = row["boxes"], row["points"]
        assert box["x0"] < point["x"] < box["x1"] and box["y0"] < point["y"] < box["y1"]


def test_image_qa_embeds_jpeg_and_asks_one_question_of_held_out_digits(raw):
    for split, count in (("train", 3), ("validation", 1)):
        for row in rows_of(raw, "demo-image-qa", split):
            assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (48, 48)
            assert len(row["qa_pairs"]["question"]) == len(row["qa_pairs"]["answer"]) == count
            assert row["qa_pairs"]["answer"][0] in set("0123456789")


def test_videos_are_h264_of_the_stated_length(raw):
    for row in rows_of(raw, "demo-video-track"):
        with av.open(str(raw / "demo-video-track" / "videos" / f"{row['video']}.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.frames, stream.average_rate) == (row["n_frames"], row["fps"])
            assert 2 <= stream.frames / stream.average_rate <= 40
            assert (stream.height, stream.width) == (row["height"], row["width"])


def test_tracks_follow_the_ink(raw):
    row = rows_of(raw, "demo-video-track")[0]
    with av.open(str(raw / "demo-video-track" / "videos" / f"{row['video']}.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24")[..., 0].astype(int) for frame in container.decode(video=0)]
    for entry in row["frame_trajectories"]:
        for point in entry["points"]:
            x, y = (int(c) for c in point["point"])
            around = frames[entry["frame"]][max(0, y - 6) : y + 6, max(0, x - 6) : x + 6]
            assert around.max() > frames[entry["frame"]].min() + 80


def test_answers_of_video_qa_are_not_among_the_negatives(raw):
    for row in rows_of(raw, "demo-video-qa"):
        assert len(set(row["NegativeAnswers"])) == 3 and row["Answer"] not in row["NegativeAnswers"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(raw, tmp_path):
    again = raw.parent / "other"
    for demo in SETS:
        make_set(demo, again, seed=0, scale=SCALE, progress=plain)
        for path in sorted((raw / demo.name).rglob("*")):
            if path.is_file() and path.suffix in {".png", ".mp4"}:
                assert path.read_bytes() == (again / path.relative_to(raw)).read_bytes(), path
    embedded = [[row["image"]["bytes"] for row in rows_of(root, "demo-image-qa")] for root in (raw, again)]
    assert embedded[0] == embedded[1]
    other = make_example(SETS[0], "train", 0, pools()["train"], 1)
    assert other.files != make_example(SETS[0], "train", 0, pools()["train"], 0).files


def test_finished_sets_are_known_and_unfinished_ones_are_not(raw):
    demo = SETS[0]
    assert is_complete(demo, raw, 0, SCALE)
    assert not is_complete(demo, raw, 1, SCALE)
    assert not is_complete(demo, raw, 0, 2 * SCALE + 1)
    mark = raw / demo.name / "made.json"
    kept = mark.read_bytes()
    mark.write_bytes(kept[: len(kept) // 2])
    assert not is_complete(demo, raw, 0, SCALE)
    mark.write_bytes(kept)


def test_texts_are_what_people_wrote(raw):
    found = list(texts(raw))
    assert "Which digit is this?" in found
    assert not [text for text in found if text.startswith("file:") or len(text) > 300]


def test_digits_on_one_picture_do_not_overlap():
    for number in range(50):
        placed = scatter(generator("overlap", number), pools()["train"], (48, 80), 16, [list(range(10))] * 6)
        cells = {(int(digit.x) // 16, int(digit.y) // 16) for digit in placed}
        assert len(cells) == 6


def test_place_words():
    assert place_word(0.1, 0.1) == "top left"
    assert place_word(0.5, 0.5) == "center"
    assert place_word(0.5, 0.9) == "bottom"
    assert place_word(0.9, 0.5) == "right"
    assert place_word(1.0, 1.0) == "bottom right"
