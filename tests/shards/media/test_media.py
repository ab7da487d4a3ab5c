"""Real files of three codecs, damaged ones, and a decoder that hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest
from in_child import fail, sleep

from shards.media.decode import read_decord, read_pyav
from shards.media.images import load_image
from shards.media.jpeg import decode_jpeg, encode_jpeg
from shards.media.timeline import read_timeline
from shards.media.types import MediaError
from shards.media.video import _in_child, probe_video, read_frames
from shards.schema import ImageRef, VideoRef

SECONDS, FPS = 3, 30


def make_video(path: Path, codec: str, size: int = 64) -> Path:
    """Frame i is grey of brightness i * 255 / 90."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(SECONDS * FPS):
            pixels = np.full((size, size, 3), number * 255 // (SECONDS * FPS), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(pixels: np.ndarray) -> list[float]:
    return [round(float(frame.mean()) * SECONDS * FPS / 255, 1) for frame in pixels]


def copy_packets(source: Path, target: Path, keep: slice, shift: int = 0, **options: Any) -> Path:
    """Remux some packets without encoding, as `ffmpeg -c copy` does."""
    with av.open(str(source)) as read, av.open(str(target), "w", **options) as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in [p for p in read.demux(read.streams.video[0]) if p.dts is not None][keep]:
            packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
            write.mux(packet)
    return target


@pytest.mark.parametrize(("codec", "name"), [("libx264", "a.mp4"), ("libvpx-vp9", "b.webm"), ("libsvtav1", "c.mp4")])
def test_frames_are_those_shown_at_the_times(tmp_path: Path, codec: str, name: str) -> None:
    ref = VideoRef(path=str(make_video(tmp_path / name, codec)))
    info = probe_video(ref)
    assert info.duration == pytest.approx(3.0, abs=0.05)
    assert info.fps == pytest.approx(30)
    assert (info.width, info.height) == (64, 64)
    frames = read_frames(ref, [0.0, 1.5, 0.5, 3.0])  # any order; the end means the last frame
    assert frames.decoder == ("pyav" if codec == "libsvtav1" else "decord")
    assert numbers(frames.pixels) == pytest.approx([0, 45, 15, 89], abs=1.5)
    clip = read_frames(VideoRef(path=ref.path, start=1.0, end=2.0), [0.0, 0.5])
    assert numbers(clip.pixels) == pytest.approx([30, 45], abs=1.5)
    assert probe_video(VideoRef(path=ref.path, start=1.0, end=2.0)).duration == pytest.approx(1.0)


def test_sizes_that_decord_cannot_copy_go_to_pyav(tmp_path: Path) -> None:
    """decord 0.6 fails on widths whose rows are padded (48 pixels in H.264)."""
    frames = read_frames(VideoRef(path=str(make_video(tmp_path / "a.mp4", "libx264", size=48))), [0.01, 1.01])
    assert frames.pixels.shape == (2, 48, 48, 3)
    assert numbers(frames.pixels) == pytest.approx([0, 30], abs=1.5)


def test_decoders_agree_on_every_frame(tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "a.mp4", "libx264"))
    line = read_timeline(path)
    assert line.countable and line.at(np.arange(0, 3, 1 / 60)).tolist() == [i // 2 for i in range(180)]
    every = np.arange(SECONDS * FPS)
    one, other = (read(path, line, every, np.copy) for read in (read_decord, read_pyav))
    assert one is not None and one.keys() == other.keys() == set(range(SECONDS * FPS))
    assert all((one[number] == other[number]).all() for number in one)
    assert numbers(np.stack(list(one.values()))) == pytest.approx(range(90), abs=1.5)


def test_what_is_made_of_frames_comes_back(tmp_path: Path) -> None:
    ref = VideoRef(path=str(make_video(tmp_path / "a.mp4", "libx264")))
    times = [0.0, 1.5, 0.5, 9.0, 3.0, 3.0]
    with pytest.raises(MediaError, match="cut short"):
        read_frames(ref, times, encode_jpeg)
    del times[3]
    made = read_frames(ref, times, encode_jpeg).each
    assert made == [encode_jpeg(pixels) for pixels in read_frames(ref, times).pixels]
    with pytest.raises(MediaError, match=r"a\.mp4: not a JPEG"):
        read_frames(ref, times, fail)


def test_videos_that_do_not_begin_at_zero_go_to_pyav(tmp_path: Path) -> None:
    """decord numbers the frames of a cut clip wrongly, without an error."""
    whole = make_video(tmp_path / "a.mp4", "libx264")
    later = copy_packets(whole, tmp_path / "later.mkv", slice(None), shift=int(90000 / 30 * 30))
    frames = read_frames(VideoRef(path=str(later)), [0.0, 1.0])
    assert frames.decoder == "pyav"
    assert numbers(frames.pixels) == pytest.approx([0, 30], abs=1.5)


def test_a_video_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """Its header is whole, so it opens; repeating its last frame to the end would pass unseen."""
    whole = make_video(tmp_path / "a.mp4", "libx264", size=256)
    fast = copy_packets(whole, tmp_path / "fast.mp4", slice(None), options={"movflags": "faststart"})
    fast.write_bytes(fast.read_bytes()[: int(fast.stat().st_size * 0.5)])
    with pytest.raises(MediaError, match=r"fast\.mp4.*(cut short|cut off)"):
        probe_video(VideoRef(path=str(fast)))
    with pytest.raises(MediaError, match="cut short"):
        read_frames(VideoRef(path=str(whole)), [0.0, 9.0])


def test_unreadable_videos_are_named(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", "libx264").read_bytes()
    cut, html = tmp_path / "cut.mp4", tmp_path / "page.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    html.write_bytes(b"<html>not found</html>")
    for path, match in ((cut, "cut.mp4"), (html, "page.mp4"), (tmp_path / "none.mp4", "no such video")):
        with pytest.raises(MediaError, match=match):
            read_frames(VideoRef(path=str(path)), [0.0])
    with pytest.raises(MediaError, match="is empty"):
        probe_video(VideoRef(path=str(tmp_path / "a.mp4"), start=5.0, end=6.0))
    assert probe_video(VideoRef(path=str(tmp_path / "a.mp4"))).num_frames == 90  # the child lives on


@pytest.mark.slow
def test_a_hanging_decoder_is_killed(tmp_path: Path) -> None:
    """A pipe that nobody writes to blocks any decoder; the deadline ends it, and the next video is read."""
    os.mkfifo(tmp_path / "pipe.mp4")
    real = make_video(tmp_path / "a.mp4", "libx264")
    since = time.monotonic()
    with pytest.raises(MediaError, match="no such video"):  # not a regular file
        read_frames(VideoRef(path=str(tmp_path / "pipe.mp4")), [0.0])
    with pytest.raises(MediaError, match="not decoded within 1 s"):
        _in_child(sleep, 1.0, VideoRef(path=str(real)))
    assert time.monotonic() - since < 30
    assert len(read_frames(VideoRef(path=str(real)), [0.0]).pixels) == 1


def test_images_and_jpeg(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load_image(ImageRef(path=str(tmp_path / "a.png"))) == pixels).all()
    assert (load_image(ImageRef(data=(tmp_path / "a.png").read_bytes())) == pixels).all()
    data = encode_jpeg(pixels)
    assert data == encode_jpeg(pixels)
    (tmp_path / "a.jpg").write_bytes(data)
    assert (decode_jpeg(data) == load_image(ImageRef(path=str(tmp_path / "a.jpg")))).all()
    for ref, match in ((ImageRef(path=str(tmp_path / "b.png")), "no such image"), (ImageRef(data=b"x"), "readable")):
        with pytest.raises(MediaError, match=match):
            load_image(ref)


def make_folder(path: Path, count: int, size: int = 8) -> VideoRef:
    """Frame i is grey of brightness 10 * i; names are not padded, so that 10 sorts before 2 as text."""
    path.mkdir()
    for number in range(count):
        PIL.Image.new("RGB", (size, size), (10 * number,) * 3).save(path / f"{number}.png")
    (path / "notes.txt").write_text("no frame")
    return VideoRef(path=str(path), fps=4.0)


def test_a_folder_of_images_is_a_video(tmp_path: Path) -> None:
    ref = make_folder(tmp_path / "v", 12)
    info = probe_video(ref)
    assert (info.duration, info.fps, info.num_frames, info.width, info.height) == (3.0, 4.0, 12, 8, 8)
    frames = read_frames(ref, [0.0, 2.5, 0.24, 3.0])
    assert frames.pixels[:, 0, 0, 0].tolist() == [0, 100, 0, 110]
    clip = VideoRef(path=ref.path, start=1.0, end=2.0, fps=4.0)
    assert probe_video(clip).duration == 1.0
    assert read_frames(clip, [0.0, 0.5]).pixels[:, 0, 0, 0].tolist() == [40, 60]


def test_bad_folders_of_images_are_told(tmp_path: Path) -> None:
    ref = make_folder(tmp_path / "v", 3)
    with pytest.raises(MediaError, match="cut short"):
        read_frames(ref, [5.0])
    PIL.Image.new("RGB", (9, 8)).save(tmp_path / "v" / "1.png")
    with pytest.raises(MediaError, match="several sizes"):
        read_frames(ref, [0.0, 0.25])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="no frames"):
        probe_video(VideoRef(path=str(tmp_path / "empty"), fps=4.0))
    with pytest.raises(MediaError, match="no such video"):  # a folder without a rate is none
        probe_video(VideoRef(path=str(tmp_path / "v")))
