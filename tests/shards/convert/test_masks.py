"""Masks as facts: run lengths as pycocotools reads them, and files for one image, for objects and for frames."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from shards.catalog import Masks
from shards.convert.masks import masks_of, packed, run_lengths
from shards.schema import RejectedError


def decoded(stored: dict) -> np.ndarray:
    return coco.decode(coco.frPyObjects(dict(stored), *stored["size"])).astype(bool)


@pytest.mark.parametrize("fill", [0.0, 0.1, 0.5, 1.0])
def test_run_lengths_are_those_of_coco(fill: float) -> None:
    mask = np.random.default_rng(3).random((13, 7)) < fill
    assert np.array_equal(decoded(run_lengths(mask)), mask)


def test_nested_masks_are_packed_and_all_else_stays() -> None:
    two = np.zeros((2, 3, 4), bool)
    two[1, 2, 3] = True
    found = packed(two.tolist())
    assert [np.array_equal(decoded(one), mask) for one, mask in zip(found, two, strict=True)] == [True, True]
    for other in (None, [], ["wall", "sky"], [0.5, 1.0], [[{"frame_id": 2, "rle": {"size": [1, 1], "counts": "01"}}]]):
        assert packed(other) == other
    with pytest.raises(RejectedError, match="not of equal length"):
        packed([[True, False], [True]])


def test_objects_beyond_255_have_masks_of_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 300], [300, 44]], np.uint16)).save(tmp_path / "1.png")
    row = Masks(files="1.png", objects="ids")
    assert masks_of(row, tmp_path, {"ids": [300, 44]}) == [
        {"size": [2, 2], "counts": [1, 2, 1]},
        {"size": [2, 2], "counts": [3, 1]},
    ]


def save(path: Path, pixels: list[list[int]], mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putdata([value for row in pixels for value in row])
    image.save(path)


def test_a_palette_tells_objects_apart_in_every_frame(tmp_path: Path) -> None:
    save(tmp_path / "Annotations/dog/00000.png", [[0, 1], [2, 2]], "P")
    save(tmp_path / "Annotations/dog/00001.png", [[0, 0], [2, 0]], "P")
    masks = Masks(files="Annotations/{video}/*.png", objects="ids")
    assert masks.columns == {"video", "ids"}
    found = masks_of(masks, tmp_path, {"video": "dog", "ids": [2, 1]})
    first, second = [[decoded(frame).tolist() for frame in frames] for frames in found]
    assert first == [[[False, False], [True, True]], [[False, False], [True, False]]]
    assert second == [[[False, True], [False, False]], [[False, False], [False, False]]]


def test_objects_may_have_files_of_their_own(tmp_path: Path) -> None:
    for number in (3, 5):
        save(tmp_path / f"masks/mose_dog_{number}/0.png", [[number, 0]])
    masks = Masks(files="masks/*_{video}_{object}/*.png", objects="ids")
    found = masks_of(masks, tmp_path, {"video": "dog", "ids": [5, 3]})
    assert [[decoded(frame).tolist() for frame in frames] for frames in found] == [[[[True, False]]], [[[True, False]]]]


def test_one_image_is_one_mask(tmp_path: Path) -> None:
    save(tmp_path / "a.png", [[127, 128]])
    (found,) = masks_of(Masks(files="{name}", above=127), tmp_path, {"name": "a.png"})
    assert decoded(found).tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["b.png", "../a.png", "/etc/passwd", "*.png", "bad.png"])
def test_masks_that_are_not_there_or_elsewhere_are_rejected(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png", [[1]])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.png").write_bytes(b"no image")
    with pytest.raises(RejectedError, match="media"):
        masks_of(Masks(files="{file}"), tmp_path / "in", {"file": name})


def test_masks_of_two_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    for source in ("lvvis", "mose_big"):
        save(tmp_path / f"masks/{source}_dog_1/0.png", [[1, 0]])
    with pytest.raises(RejectedError, match="several folders: lvvis_dog_1, mose_big_dog_1"):
        masks_of(Masks(files="masks/*_{video}_1/*.png"), tmp_path, {"video": "dog"})
