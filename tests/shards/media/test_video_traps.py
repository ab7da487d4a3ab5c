"""Videos of the wild: each gives the frames that a full decode by time of presentation gives, or a reason why not."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from video_cases import (
    NUM,
    RATE,
    Pixels,
    all_frames,
    copy_with_junk,
    cut,
    encode,
    encode_tone,
    key_packets,
    number_of,
    overwrite,
    packet_places,
    picture,
)

from shards.media.types import MediaError
from shards.media.video import probe_video, read_frames
from shards.schema import VideoRef

Maker = Callable[[Path], Path]
HOURS = 10


def uneven(index: int) -> int:
    return 40 * index + index // 7 * 130 + index % 3 * 7


def sequential(path: Path, times: list[float]) -> tuple[list[Pixels], list[float]]:
    """The frames at `times` by a decode of everything, and when each of them begins."""
    frames = all_frames(path)
    begins = np.array([time for time, _ in frames])
    assert (np.diff(begins) > 0).all()
    numbers = np.searchsorted(begins, np.array(times) + 1e-3, side="right") - 1
    return [frames[number][1] for number in numbers], begins.tolist()


def check(path: Path, first: int, decoder: str, count: int) -> None:
    """Every frame, in the middle of its time and in a mixed order; and a sparse choice, which makes decoders seek."""
    info = probe_video(VideoRef(path=str(path)))
    _, begins = sequential(path, [])
    ends = [*begins[1:], info.duration]
    middles = [(begin + end) / 2 for begin, end in zip(begins, ends, strict=True)]
    for times in (middles[::-1], middles[::7], middles[-1:], [begins[3], middles[-1]], [0.0, info.duration]):
        frames = read_frames(VideoRef(path=str(path)), times)
        expected, _ = sequential(path, times)
        assert frames.decoder == decoder
        assert np.abs(frames.pixels.astype(int) - expected).max() <= 2, "decoders round, no more"
    assert [number_of(pixels) for pixels in read_frames(VideoRef(path=str(path)), middles).pixels] == list(
        range(first, first + len(begins))
    )
    assert info.num_frames == len(begins) == count


GOOD: dict[str, tuple[Maker, str]] = {
    "h264.mp4": (encode, "decord"),
    "h264_240.mp4": (lambda path: encode(path, size=(320, 240)), "decord"),
    "h264.mkv": (encode, "decord"),
    "vp8.webm": (lambda path: encode(path, "libvpx"), "decord"),
    "vp9.webm": (lambda path: encode(path, "libvpx-vp9"), "decord"),
    "av1.mp4": (lambda path: encode(path, "libsvtav1", options={"svtav1-params": "preset=12"}), "pyav"),
    "mpeg4.avi": (lambda path: encode(path, "mpeg4"), "decord"),
    "mpeg4_b_frames.avi": (lambda path: encode(path, "mpeg4", options={"bf": "2"}), "pyav"),
    "mpeg4_b_frames.mp4": (lambda path: encode(path, "mpeg4", options={"bf": "2"}), "pyav"),
    "h264.ts": (encode, "pyav"),
    "fragments.mp4": (lambda path: encode(path, container={"movflags": "frag_keyframe+empty_moov"}), "pyav"),
    "ten_bits.mp4": (lambda path: encode(path, pix_fmt="yuv420p10le"), "pyav"),
    "odd.webm": (lambda path: encode(path, "libvpx-vp9", size=(99, 75)), "pyav"),
    "709.mp4": (lambda path: encode(path, options={"x264-params": "colormatrix=bt709:fullrange=on"}), "decord"),
    "odd.mp4": (lambda path: encode(path, size=(99, 75), pix_fmt="yuv444p"), "pyav"),
    "uneven.mp4": (lambda path: encode(path, times=uneven), "decord"),
    "uneven.mkv": (lambda path: encode(path, times=uneven), "decord"),
    "sound_outlasts.mkv": (lambda path: encode(path, audio=9), "decord"),
    # key frames with leading pictures: decord is 1 to 3 frames off after every seek, and says nothing
    "open_gop.mp4": (lambda path: encode(path, options={"x264-params": "open-gop=1:bframes=3"}), "pyav"),
    "h265.mp4": (lambda path: encode(path, "libx265"), "pyav"),
}


@pytest.mark.parametrize("name", GOOD)
def test_frames_are_those_of_a_full_decode(tmp_path: Path, name: str) -> None:
    make, decoder = GOOD[name]
    check(make(tmp_path / name), 0, decoder, NUM)


def test_one_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "one.mp4", numbers=[37])
    assert probe_video(VideoRef(path=str(path))).duration == pytest.approx(1 / RATE)
    assert [number_of(pixels) for pixels in read_frames(VideoRef(path=str(path)), [0.0, 0.04]).pixels] == [37, 37]


@pytest.mark.parametrize(
    ("name", "key", "seconds", "first", "decoder", "options"),
    [
        ("at_a_key.mp4", 10, 0.4, 10, "decord", {}),
        ("between_keys.mp4", 10, 0.6, 15, "pyav", {}),  # an edit list hides five frames
        ("between_keys.mov", 10, 0.6, 15, "pyav", {}),
        ("shown_before_0.mp4", 10, 0.6, 10, "pyav", {"movflags": "frag_keyframe+empty_moov+delay_moov"}),
        ("late.mp4", 10, 0.6, 10, "pyav", {"avoid_negative_ts": "make_zero", "use_editlist": "0"}),
        ("cut.mkv", 10, 0.4, 10, "decord", {}),
        ("hours_later.mkv", 0, -3600.0 * HOURS, 0, "pyav", {}),
    ],
)
def test_clips_that_were_cut_without_encoding(
    tmp_path: Path, name: str, key: int, seconds: float, first: int, decoder: str, options: dict[str, str]
) -> None:
    check(
        cut(encode(tmp_path / "whole.mp4"), tmp_path / name, key, seconds, options=options), first, decoder, NUM - first
    )


def test_a_cut_of_leading_pictures(tmp_path: Path) -> None:
    """The first key frame is followed by frames that refer to what was cut away. H.265 drops them, H.264 complains."""
    for codec, params in (("libx264", "open-gop=1:bframes=3"), ("libx265", "log-level=none:open-gop=1:bframes=3")):
        whole = encode(tmp_path / f"{codec}.mp4", codec, options={f"{codec.removeprefix('lib')}-params": params})
        path = cut(whole, tmp_path / f"{codec}.mkv", key_packets(whole)[2], 0.8, negative="make_zero")
        with pytest.raises(MediaError, match=rf"{codec}\.mkv"):
            read_frames(VideoRef(path=str(path)), [0.0])
        expected, _ = sequential(path, [0.3, 0.9])
        try:
            pixels = read_frames(VideoRef(path=str(path)), [0.3, 0.9]).pixels
            assert codec == "libx265" and (pixels == expected).all()
        except MediaError as error:
            assert codec == "libx264" and f"{path.name}: damaged" in str(error)


def test_a_cut_that_does_not_begin_with_a_key_frame(tmp_path: Path) -> None:
    for number, suffix in enumerate((".mp4", ".mkv", ".webm")):
        codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
        whole = encode(tmp_path / f"whole{number}.mkv", codec)
        path = cut(whole, tmp_path / f"cut{suffix}", 14, 0.52, negative="auto")
        with pytest.raises(MediaError, match=rf"cut\{suffix}"):
            read_frames(VideoRef(path=str(path)), [0.0, 1.0])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_videos(tmp_path: Path, rotation: int) -> None:
    path = encode(tmp_path / "turned.mp4", size=(96, 64), rotation=rotation)
    turned, _ = sequential(path, [1.0])
    expected = np.rot90(turned[0], rotation // 90)
    info, frames = probe_video(VideoRef(path=str(path))), read_frames(VideoRef(path=str(path)), [1.0])
    assert frames.decoder == "pyav"
    assert (frames.pixels[0] == expected).all()
    assert (info.height, info.width) == expected.shape[:2]
    assert number_of(turned[0]) == 25


def test_mirrored_videos(tmp_path: Path) -> None:
    """A display matrix may mirror as well; its words stand in the track header of the file."""
    path = encode(tmp_path / "mirrored.mp4", rotation=180)
    content = path.read_bytes()
    minus = (-65536).to_bytes(4, "big", signed=True)
    place = content.index(minus, content.index(b"tkhd"))
    overwrite(path, place + 16, (65536).to_bytes(4, "big"))  # d: rows stay, columns are turned round
    plain, _ = sequential(path, [1.0])
    assert (read_frames(VideoRef(path=str(path)), [1.0]).pixels[0] == plain[0][:, ::-1]).all()
    overwrite(path, place + 4, (46341).to_bytes(4, "big"))
    with pytest.raises(MediaError, match=r"mirrored\.mp4.*quarter turn"):
        read_frames(VideoRef(path=str(path)), [1.0])


def test_a_header_that_counts_too_many_frames(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4")
    path = copy_with_junk(whole, tmp_path / "counts.mp4", 30)
    with pytest.raises(MediaError, match=r"counts\.mp4"):
        read_frames(VideoRef(path=str(path)), [0.0, 3.0])
    frames = read_frames(VideoRef(path=str(path)), [0.0, 1.0])  # what can be decoded is right
    assert [number_of(pixels) for pixels in frames.pixels] == [0, 25]


def test_a_header_that_promises_hours(tmp_path: Path) -> None:
    """The length of the stream in AVI, of the file in Matroska; MP4 has a table of all frames, which is believed."""
    avi, mkv, mp4 = (encode(tmp_path / f"long{suffix}", "mpeg4") for suffix in (".avi", ".mkv", ".mp4"))
    overwrite(avi, avi.read_bytes().index(b"strh") + 40, (10**6).to_bytes(4, "little"))
    overwrite(mkv, mkv.read_bytes().index(b"\x44\x89\x88") + 3, struct.pack(">d", 3.6e6 * HOURS))
    for path in (avi, mkv):
        with pytest.raises(MediaError, match=rf"{path.name}: ends at 2\..* s, its header says .* cut short"):
            probe_video(VideoRef(path=str(path)))
    for box, place in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        overwrite(mp4, mp4.read_bytes().index(box) + place, (10**8).to_bytes(4, "big"))
    check(mp4, 0, "decord", NUM)


# --- damage ----------------------------------------------------------------------------------------------------------


def right_or_refused(path: Path, expected: list[Pixels], times: list[float]) -> bool:
    """Whether it was refused, by a reason that names the file; if not, its frames are those before the damage."""
    try:
        info = probe_video(VideoRef(path=str(path)))
        assert info.duration == pytest.approx(NUM / RATE)
        pixels = read_frames(VideoRef(path=str(path)), times).pixels
    except MediaError as error:
        assert path.name in str(error)
        return True
    assert (pixels == expected).all()
    return False


CODECS = {"h264.mp4": "libx264", "h265.mkv": "libx265", "vp8.webm": "libvpx", "vp9.webm": "libvpx-vp9"}
CODECS |= {"av1.mp4": "libsvtav1", "mpeg4.avi": "mpeg4"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_zeros_in_the_middle(tmp_path: Path, name: str) -> None:
    """Of a packet, over packets, over what the container says of them; decoders conceal it or take it for a picture."""
    whole = encode(tmp_path / f"whole_{name}", CODECS[name], size=(320, 240))
    times = [number / RATE for number in range(0, NUM, 3)]
    expected = read_frames(VideoRef(path=str(whole)), times).pixels
    places = [place for place in packet_places(whole) if place[1] > 400]
    middle = len(places) // 2
    for number, (offset, size) in enumerate(places[middle : middle + 2]):
        spans = {"inside": (offset + size // 3, 128), "packet": (offset, size), "block": (offset // 512 * 512, 4096)}
        for kind, (start, length) in spans.items():
            path = tmp_path / f"{kind}{number}_{name}"
            shutil.copy(whole, path)
            overwrite(path, start, bytes(min(length, whole.stat().st_size - start)))
            assert right_or_refused(path, expected, times)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_truncation(tmp_path: Path, name: str) -> None:
    """At any place; with the index in front, as it lies in files that were made to be sent."""
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    whole = encode(tmp_path / f"whole_{name}", CODECS[name], size=(320, 240), container=options)
    times = [0.0, NUM / RATE]
    expected, _ = sequential(whole, times)
    content = whole.read_bytes()
    for percent in (3, 20, 50, 80, 99):
        path = tmp_path / f"{percent}_{name}"
        path.write_bytes(content[: len(content) * percent // 100])
        refused = right_or_refused(path, expected, times)
        assert refused or percent == 99  # the index at the end may be missing
    assert not right_or_refused(whole, expected, times)


def test_files_without_a_picture(tmp_path: Path) -> None:
    tone = encode_tone(tmp_path / "tone.mp4", 1)
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as write:
        cover = write.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        write.mux(cover.encode(av.VideoFrame.from_ndarray(picture(3, (64, 64)), format="rgb24")))
        write.mux(cover.encode())
    for path in (tone, song):
        with pytest.raises(MediaError, match=rf"{path.name}: no video stream"):
            probe_video(VideoRef(path=str(path)))
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.write_bytes(b"")
    text.write_text("404 not found")
    for path in (empty, text):
        with pytest.raises(MediaError, match=path.name):
            probe_video(VideoRef(path=str(path)))
