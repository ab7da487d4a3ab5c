"""Videos as long as the published ones, through the limits of the catalog: what is sampled, and that nothing is lost.

The files have two frames a second, which is what the rules sample at most of all but tracks; these have six.
"""

from typing import Any

import pytest
from processing_cases import BASE_VOCAB, example, tiny_tokenizer, write_video

from molmo2.processing.processor import Processor
from shards.catalog import load_catalog
from shards.layout import VisualLayout, VisualTokens, expand
from shards.schema import PointGroup, Points, Sample, Text, TrackGroup, Tracks, VideoRef

MOLMO2 = VisualLayout(
    tokens=VisualTokens.after(BASE_VOCAB), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
LIMITS = {stage: settings.limits for stage, settings in load_catalog("molmo2").stages.items()}
VIDEOS = {40: 6, 63: 6, 300: 6, 1800: 2}  # seconds -> frames per second


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[int, VideoRef]:
    folder = tmp_path_factory.mktemp("videos")
    return {seconds: write_video(folder / f"{seconds}.mp4", seconds * fps, fps) for seconds, fps in VIDEOS.items()}


def process(annotation: Any, video: VideoRef, stage: str = "sft") -> Sample:
    sample = Processor(MOLMO2, tiny_tokenizer(), "sft", 2)(example(annotation, video=video), LIMITS[stage])
    visuals = sample.record["visuals"]
    assert all(
        len(expand(MOLMO2, tokens, visuals).input_ids) <= LIMITS[stage].sequence_length for tokens in sample.variants
    )
    return sample


def times_of(sample: Sample) -> list[float]:
    return [visual["time"] for visual in sample.record["visuals"]]


def pointed(*times: float) -> Points:
    groups = tuple(PointGroup(at=time, points=((0.25, 0.5),)) for time in times)
    return Points(style="video_point_count", label="x", question="How many?", groups=groups)


def answer_of(sample: Sample) -> str:
    return sample.record["variants"][0]["messages"][1]["content"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "times", "kept"),
    [(40, (20.0, 31.5), 2), (40, (5.0, 20.0, 22.5, 38.0), 3), (63, (62.5,), 1), (63, (1.0, 30.5, 32.0, 62.0), 2)],
)
def test_points_of_a_long_clip_keep_their_frames(
    videos: dict[int, VideoRef], seconds: int, times: tuple[float, ...], kept: int
) -> None:
    sample = process(pointed(*times), videos[seconds])
    assert 40 <= len(sample.images) <= 46, "as many frames as 4,096 tokens hold"
    assert times_of(sample) == [i / 2 for i in range(len(sample.images))]
    assert answer_of(sample).count(";") == kept - 1
    assert ("total of" in answer_of(sample)) == (kept == len(times)), "what is no longer whole is not counted"
    whole = process(pointed(*times), videos[seconds], "long")
    assert times_of(whole) == [i / 2 for i in range(2 * seconds + 1)]
    assert f"shows a total of {len(times)}" in answer_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [40, 63])
def test_a_clip_without_points_is_seen_as_a_whole(videos: dict[int, VideoRef], seconds: int) -> None:
    times = times_of(process(pointed(), videos[seconds]))
    assert 40 <= len(times) <= 46 and times[0] == 0 and times[-1] == seconds


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [300, 1800])
def test_a_long_caption_of_a_long_video_fits(videos: dict[int, VideoRef], seconds: int) -> None:
    caption = "It goes on and on. " * 150
    short = process(Text(style="video_long_caption", answer=caption), videos[seconds])
    assert 8 <= len(short.images) < 32 and times_of(short)[-1] == seconds
    long = process(Text(style="video_long_caption", answer=caption), videos[seconds], "long")
    assert 370 < len(long.images) <= 384 and times_of(long)[-1] == seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "seconds", "rate", "count"),
    [("sft", 40, 1, 40), ("sft", 63, 1, 44), ("long", 300, 1, 300)],
)
def test_tracks_have_the_densest_rate_that_spans_the_clip(
    videos: dict[int, VideoRef], stage: str, seconds: int, rate: int, count: int
) -> None:
    groups = tuple(TrackGroup(time=i / 6, objects=((0, 0.5, 0.5),)) for i in range(0, 6 * seconds, 60))
    tracks = Tracks(style="video_point_track_per_frame", label="x", fps=2.0, groups=groups, video_fps=6.0)
    times = times_of(process(tracks, videos[seconds], stage))
    assert times == [i / rate for i in range(len(times))] and count - 2 <= len(times) <= count
