"""Tilings, token counts and frame times against Molmo2's published rules; pixels against transformers."""

import numpy as np
import pytest
from processing_cases import REAL, noise, tiny_tokenizer

from molmo2.processing import tiling as images
from molmo2.processing.frames import frame_times, timestamp, track_times
from shards.layout import split_crops, visual_crops, visual_pooling, visual_tokens

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
    (6400, 200, 24, (24, 1), 25, 3444, 3680),
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


@pytest.mark.parametrize(
    ("size", "official", "theirs"),
    [((30, 2000), (1, 8), (1, 1)), ((100, 800), (1, 3), (1, 1)), ((111, 2000), (1, 8), (1, 1))],
)
def test_short_sides_follow_the_official_rule_not_transformers(size, official, theirs) -> None:
    """transformers takes the border off without a limit, and a side below 112 px turns negative."""
    from transformers.models.molmo2.image_processing_molmo2 import compute_crop_geometry

    assert compute_crop_geometry(*size, 8, [4, 4], 378, 14)[:2] == theirs
    tiling = images.choose_tiling(REAL, *size, 8)
    assert tiling == official
    rgb = noise(*size)
    view, canvas = images.view(REAL, rgb), images.canvas(REAL, rgb, tiling)
    assert canvas.shape == (378, official[1] * 266 + 112, 3)
    assert len(split_crops(REAL, tiling, view, canvas)) == 1 + official[1]


@pytest.mark.parametrize("max_crops", [8, 24])
@pytest.mark.parametrize("size", [(768, 1024), (2000, 2000), (113, 900)])
def test_pixels_and_pooling_equal_transformers_at_both_budgets(size, max_crops) -> None:
    from transformers.models.molmo2 import Molmo2ImageProcessor

    rgb = noise(*size)
    processor = Molmo2ImageProcessor(do_rescale=False, do_normalize=False, max_crops=max_crops)
    theirs = processor([rgb, noise(300, 200)], return_tensors="np", device="cpu")
    crops, pooling = [], []
    for picture in (rgb, noise(300, 200)):
        tiling = images.choose_tiling(REAL, *picture.shape[:2], max_crops)
        local = visual_pooling(REAL, {"kind": "image", "tiling": tiling})
        pooling.append(np.where(local >= 0, local + 729 * sum(len(c) for c in crops), -1))
        crops.append(split_crops(REAL, tiling, images.view(REAL, picture), images.canvas(REAL, picture, tiling)))
    joined = np.concatenate(crops)
    patches = joined.reshape(len(joined), 27, 14, 27, 14, 3).swapaxes(2, 3).reshape(len(joined), 729, 588)
    np.testing.assert_array_equal(patches, theirs["pixel_values"])
    np.testing.assert_array_equal(np.concatenate(pooling), theirs["image_token_pooling"])
    assert theirs["image_num_crops"].tolist() == [len(c) for c in crops]


@pytest.mark.parametrize("size", [(48, 64), (720, 406), (378, 378)])
def test_frames_equal_transformers(size) -> None:
    from transformers.models.molmo2 import Molmo2VideoProcessor
    from transformers.video_utils import VideoMetadata

    frames = np.stack([noise(*size, seed) for seed in range(3)])
    processor = Molmo2VideoProcessor(
        do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True, do_sample_frames=False
    )
    metadata = VideoMetadata(total_num_frames=3, fps=2.0, duration=1.5, frames_indices=[0, 1, 2])
    theirs = processor([frames], video_metadata=[metadata], return_tensors="np", device="cpu")["pixel_values_videos"]
    ours = images.view(REAL, frames).reshape(3, 27, 14, 27, 14, 3).swapaxes(2, 3).reshape(3, 729, 588)
    np.testing.assert_allclose(ours / 127.5 - 1, theirs.reshape(3, 729, 588), atol=1e-6, rtol=0)


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
    times = frame_times(frames / fps, 2.0, most)
    assert len(times) == count and times[0] == 0 and times[-1] == frames / fps
    assert timestamp(1, times[-1]) == f" {last} "
    assert list(times) == sorted(times)


def test_frame_rule_at_its_borders() -> None:
    assert frame_times(0.0, 2.0, 8) == (0.0,)
    assert frame_times(10.0, 2.0, 1) == (0.0,)
    assert frame_times(1.0, 2.0, 8) == (0.0, 0.5, 1.0)
    assert frame_times(3.5, 2.0, 8) == tuple(i / 2 for i in range(8))  # (F - 1) / S = duration: still the grid
    assert frame_times(3.6, 2.0, 8) == tuple(np.linspace(0, 3.6, 8).tolist())
    with pytest.raises(ValueError, match="max_frames = 0"):
        frame_times(1.0, 2.0, 0)


@pytest.mark.parametrize(
    ("seconds", "video_fps", "most", "rate", "count"),
    [
        (20.0, 6, 128, 6, 120),
        (21.5, 6, 128, 3, 65),  # 128 frames at 6 per second end at 21.3 s
        (40.0, 6, 128, 3, 120),
        (63.0, 6, 128, 2, 126),
        (100.0, 6, 128, 1, 100),
        (128.0, 6, 128, 1, 128),
        (300.0, 6, 128, 1, 128),  # the end is cut off
        (300.0, 6, 384, 1, 300),
        (40.0, 6, 384, 6, 240),
        (12.0, 30, 128, 10, 120),
        (13.0, 30, 128, 6, 78),
        (10.0, 24, 128, 8, 80),
        (10.0, 25, 128, 5, 50),
        (10.0, 29, 128, 1, 10),
        (0.2, 6, 128, 6, 2),
        (0.0, 6, 128, 6, 1),
    ],
)
def test_tracks_take_the_largest_rate_of_their_video_that_spans_it(seconds, video_fps, most, rate, count) -> None:
    assert track_times(seconds, video_fps, most) == tuple(i / rate for i in range(count))


def stamp_tokens(index: int, time: float) -> int:
    """Tokens of a timestamp: one a character, digits standing alone, a space belonging to what follows it or alone."""
    return len(tiny_tokenizer().encode(timestamp(index, time)))


@pytest.mark.parametrize(
    ("duration", "most", "frames", "total"),
    [
        (0.0, 128, 1, 87),  # one frame: 83 and "0.0 "
        (0.5, 128, 2, 175),
        (63.5, 128, 128, 11_371),
        (1800.0, 128, 128, None),
        (191.5, 384, 384, 34_339),
        (1800.0, 384, 384, 34_705),
    ],
)
def test_video_token_totals(duration, most, frames, total) -> None:
    frame = visual_tokens(REAL, {"kind": "frame"})
    tokens = REAL.tokens
    assert frame.tolist() == [tokens.frame_start, *[tokens.im_patch] * 81, tokens.frame_end]
    times = frame_times(duration, 2.0, most)
    assert len(times) == frames and times[-1] == duration
    widths = [stamp_tokens(i, time) for i, time in enumerate(times)]
    limits = ((10, 5), (100, 6), (1000, 7), (10_000, 8))
    rounded = [float(f"{time:.1f}") for time in times]
    assert widths == [4, *(next(width for end, width in limits if time < end) for time in rounded[1:])]
    assert len(frame) * frames + sum(widths) == (total or 83 * frames + sum(widths))


def test_several_images_add_up() -> None:
    """ "Image 1" and so on stand outside; the images' own tokens are those of the table."""
    tilings = [images.choose_tiling(REAL, *size, 8) for size in ((480, 640), (1920, 1080), (300, 300))]
    assert [len(visual_tokens(REAL, {"kind": "image", "tiling": tiling})) for tiling in tilings] == [752, 1208, 410]
