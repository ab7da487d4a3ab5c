"""Tilings, token counts and frame times against Molmo2's published rules; pixels against transformers."""

import numpy as np
import pytest
from processing_cases import REAL, noise, tiny_tokenizer

from molmo2.processing import images, video
from shards.layout import split_crops, visual_crops, visual_tokens

TABLE = [  # height, width, most tiles, tiling, crops, im_patch tokens, all tokens
    (300, 300, 8, (1, 1), 2, 392, 410),
    (378, 378, 24, (1, 1), 2, 392, 410),
    (480, 640, 8, (2, 2), 5, 725, 752),
    (480, 640, 24, (2, 2), 5, 725, 752),
    (768, 1024, 8, (2, 3), 7, 955, 982),
    (768, 1024, 24, (3, 4), 13, 1582, 1619),
    (1080, 1920, 8, (2, 4), 9, 1162, 1189),
    (1080, 1920, 24, (4, 6), 25, 2758, 2804),
    (1920, 1080, 8, (4, 2), 9, 1162, 1208),
    (1920, 1080, 24, (6, 4), 25, 2758, 2823),
    (2000, 2000, 8, (2, 2), 5, 725, 752),
    (2000, 2000, 24, (4, 4), 17, 1960, 2006),
    # a side shorter than the border: the official rule clamps it, transformers does not
    (30, 2000, 8, (1, 8), 9, 1316, None),
    (100, 800, 8, (1, 3), 4, None, None),
    (111, 2000, 8, (1, 8), 9, 1316, None),
    (2000, 30, 8, (8, 1), 9, 1316, 1400),
]


@pytest.mark.parametrize(("height", "width", "most", "tiling", "crops", "patches", "tokens"), TABLE)
def test_tiling_table(height, width, most, tiling, crops, patches, tokens) -> None:
    assert images.choose_tiling(REAL, height, width, most) == tiling
    visual = {"kind": "image", "tiling": tiling}
    ids = visual_tokens(REAL, visual)
    assert visual_crops(visual) == crops
    assert patches in (None, int((ids == REAL.tokens.im_patch).sum()))
    assert tokens in (None, len(ids))


def test_tilings_equal_transformers_from_the_border_up() -> None:
    from transformers.models.molmo2.image_processing_molmo2 import compute_crop_geometry

    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = np.exp(rng.uniform(np.log(113), np.log(5000), 2)).astype(int).tolist()
        most = int(rng.choice([1, 4, 8, 24]))
        want = compute_crop_geometry(height, width, most, [4, 4], 378, 14)
        tiling = images.choose_tiling(REAL, height, width, most)
        assert (*tiling, *REAL.canvas_size(tiling)) == want, (height, width, most)


@pytest.mark.parametrize("size", [(120, 97), (480, 640), (1080, 1920), (378, 378), (640, 200), (50, 60)])
def test_pixels_equal_transformers(size) -> None:
    from transformers.models.molmo2 import Molmo2ImageProcessor

    rgb = noise(*size)
    theirs = Molmo2ImageProcessor(do_rescale=False, do_normalize=False)(rgb, return_tensors="np", device="cpu")
    tiling = images.choose_tiling(REAL, *size, 8)
    crops = split_crops(REAL, tiling, images.view(REAL, rgb), images.canvas(REAL, rgb, tiling))
    patches = crops.reshape(len(crops), 27, 14, 27, 14, 3).swapaxes(2, 3).reshape(len(crops), 729, 588)
    np.testing.assert_array_equal(patches, theirs["pixel_values"])


def test_one_tile_needs_no_second_file() -> None:
    rgb = noise(90, 200)
    assert images.canvas_is_view((1, 1)) and not images.canvas_is_view((1, 2))
    np.testing.assert_array_equal(images.view(REAL, rgb), images.canvas(REAL, rgb, (1, 1)))


def test_clip_is_resized_frame_by_frame() -> None:
    clip = np.stack([noise(40, 30, seed) for seed in range(3)])
    want = np.stack([images.view(REAL, frame) for frame in clip])
    np.testing.assert_array_equal(images.view(REAL, clip), want)
    same = noise(378, 378)
    assert images.view(REAL, same) is same


@pytest.mark.parametrize(
    ("frames", "fps", "most", "count", "last"),
    [
        (900, 30.0, 384, 61, "30.0"),
        (300, 29.97, 384, 22, "10.0"),
        (9000, 30.0, 384, 384, "300.0"),
        (9000, 30.0, 128, 128, "300.0"),
        (1905, 30.0, 128, 128, "63.5"),
        (1, 30.0, 128, 2, "0.0"),
    ],
)
def test_frame_rule(frames, fps, most, count, last) -> None:
    times = video.frame_times(frames / fps, 2.0, most)
    assert len(times) == count and times[0] == 0 and times[-1] == frames / fps
    assert video.timestamp(1, times[-1]) == f" {last} "
    assert list(times) == sorted(times)


def test_frame_rule_at_its_borders() -> None:
    assert video.frame_times(0.0, 2.0, 8) == (0.0,)
    assert video.frame_times(10.0, 2.0, 1) == (0.0,)
    assert video.frame_times(1.0, 2.0, 8) == (0.0, 0.5, 1.0)
    assert video.frame_times(3.5, 2.0, 8) == tuple(i / 2 for i in range(8))  # (F - 1) / S = duration: still the grid
    assert video.frame_times(3.6, 2.0, 8) == tuple(np.linspace(0, 3.6, 8).tolist())
    with pytest.raises(ValueError, match="max_frames = 0"):
        video.frame_times(1.0, 2.0, 0)


def test_tracking_keeps_the_grid_and_cuts_the_end() -> None:
    assert video.grid_times(1.2, 2.0, 8) == (0.0, 0.5, 1.0)
    assert video.grid_times(100.0, 2.0, 4) == (0.0, 0.5, 1.0, 1.5)
    assert video.grid_times(0.0, 2.0, 4) == (0.0,)


@pytest.mark.parametrize(("duration", "most", "total"), [(63.5, 128, 11371), (191.5, 384, 34339), (1800.0, 384, 34705)])
def test_video_token_totals(duration, most, total) -> None:
    """One token per character of "12.5 ": digits stand alone, the space before a number too."""
    frame = len(visual_tokens(REAL, {"kind": "frame"}))
    stamps = [video.timestamp(i, time) for i, time in enumerate(video.frame_times(duration, 2.0, most))]
    assert frame == 83
    assert frame * len(stamps) + sum(len(tiny_tokenizer().encode(stamp)) for stamp in stamps) == total
