"""One video file, decoded in this process: its timeline, and the frames at some of its times.

Which frame is wanted is read off the packets, for their times are the times of presentation; a decoder only has to
deliver the frame of that time. PyAV names the time of each frame that it gives. decord does not: it counts frames, and
miscounts them without an error after a seek to a key frame with leading pictures, in files with an edit list, and
where decoding does not start at 0. It is used where nothing of that kind is in the file and its own times are those of
the packets; PyAV takes all others, and those that are to be turned or that decord 0.6 cannot read.

Damage: decoders conceal it, and only write to the standard error about it. What they write there sends a file from
decord to PyAV, and ends it with PyAV. A hole of zeros is looked for as well, since VP8 and VP9 take one for a picture.

Deadlines, clips of a video and folders of images are `shards.media`.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.media import MISSING_TAIL, ROUNDING, Frames, MediaError, Pixels, check_end

COUNTED_BY_DECORD = {"h264", "hevc", "vp8", "vp9", "mpeg4"}
HOLE = bytes(64)  # of a disk or a download; entropy coding leaves no such run
COMPLAINT = re.compile(r"\[([^\]]+) @ 0x[0-9a-f]+\] *(.+)")
UPRIGHT = (1, 0, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What the packets of a video say.

    Attributes:
        begins: int64 [N], when each frame that is shown begins, rising, in units of `unit` seconds.
        keys: int64 [K], those of them at which decoding can start, rising.
        unit: seconds.
        duration: seconds from the first frame to the end of the last.
        fps: mean rate of the stream.
        width: pixels of a frame as it is shown, turned.
        height: the same.
        codec: name of the codec.
        turn: signs (a, b, c, d) of the display matrix, which sends x, y to ax + cy, bx + dy.
        countable: whether the k-th frame that decord counts is the k-th that is shown, as far as packets tell.
    """

    begins: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    unit: float
    duration: float
    fps: float
    width: int
    height: int
    codec: str
    turn: tuple[int, int, int, int]
    countable: bool

    def at(self, times: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Numbers of the frames that are shown at `times`, seconds from the first: the last that begins no later."""
        begins = (self.begins - self.begins[0]) * self.unit
        return np.maximum(np.searchsorted(begins, times + ROUNDING, side="right") - 1, 0)


def read_timeline(path: str) -> Timeline:
    """The timeline of a video, from one pass over its packets.

    Raises:
        MediaError: not a video, damaged, cut short, or without times.
    """
    state = Path(path).stat()
    return _timeline(path, state.st_size, state.st_mtime_ns)


def decode(path: str, times: npt.NDArray[np.float64]) -> Frames:
    """The frames shown at `times`, seconds from the first frame.

    Raises:
        MediaError: as in `read_timeline`, or a frame that cannot be decoded.
    """
    line = read_timeline(path)
    check_end(path, line.duration, times)
    numbers = line.at(times)
    pixels = read_decord(path, line, numbers) if line.countable else None
    if pixels is not None:
        return Frames(pixels=pixels, decoder="decord")
    return Frames(pixels=read_pyav(path, line, numbers), decoder="pyav")


# --- packets ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # a video is probed, then read
def _timeline(path: str, size: int, changed: int) -> Timeline:
    with _opened(path) as (container, stream, said):
        packets, end = _packets(path, container, stream)
        unit, fps = float(stream.time_base), float(stream.average_rate or 0)
        codec = stream.codec_context.name
        demuxer = container.format.name
        plain = not stream.start_time and len(container.streams.video) == 1 and _plain_colours(stream)
    lost = [what for who, what in said if who == demuxer]  # packets that the demuxer could not find
    if lost:
        raise MediaError(f"{path}: damaged ({lost[0]})")
    begins = np.unique(np.array([pts for pts, _, hidden in packets if not hidden], np.int64))
    duration = end - float(begins[0]) * unit if len(begins) else 0.0
    if duration <= 0:
        raise MediaError(f"{path}: no frame or no duration in the video stream")
    height, width, turn = _first_frame(path)
    plain = plain and begins[0] == 0 and len(begins) == len(packets) and turn == UPRIGHT and not said
    return Timeline(
        begins=begins,
        keys=np.unique(np.array([pts for pts, key, _ in packets if key], np.int64)),
        unit=unit,
        duration=duration,
        fps=fps or len(begins) / duration,
        width=width,
        height=height,
        codec=codec,
        turn=turn,
        countable=bool(plain and codec in COUNTED_BY_DECORD and _closed(packets)),
    )


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any, list[tuple[str, str]]]]:
    """A file, its first video stream that is no cover of an album, and the complaints since it was opened.

    Complaints of the opening itself are left out: it looks at streams that nobody wants.
    """
    import av

    with complaints(), av.open(path) as container, complaints() as said:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise MediaError(f"{path}: no video stream")
        streams[0].codec_context.thread_count = 1  # a builder has a process per core
        yield container, streams[0], said


def _packets(path: str, container: Any, stream: Any) -> tuple[list[tuple[int, bool, bool]], float]:
    """(time, is a key frame, is not shown) of each packet in order of decoding; seconds at which the last ends."""
    packets: list[tuple[int, bool, bool]] = []
    step = 1 / (stream.average_rate * stream.time_base) if stream.average_rate else 0
    ends = {"video": 0.0, "all": 0.0}
    for packet in container.demux():
        if not packet.size or (packet.pts is None and packet.stream_index != stream.index):
            continue
        if packet.pts is None:
            raise MediaError(f"{path}: frames without times of presentation")
        end = float((packet.pts + (packet.duration or step)) * packet.time_base)
        ends["all"] = max(ends["all"], end)
        if packet.stream_index == stream.index:
            ends["video"] = max(ends["video"], end)
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
            if packet.is_corrupt or (stream.codec_context.codec.lossy and HOLE in bytes(packet)):
                what = "is cut off" if packet.is_corrupt else "has a hole of zeros"
                raise MediaError(f"{path}: damaged, the packet at {float(packet.pts * packet.time_base):.2f} s {what}")
    _check_claim(path, container, stream, ends, min((pts for pts, _, hidden in packets if not hidden), default=0))
    return packets, ends["video"]


def _plain_colours(stream: Any) -> bool:
    """Whether decord and PyAV make the same RGB: of 8 bits, and of rows and columns that halve."""
    context = stream.codec_context
    return not (context.width % 2 or context.height % 2) and all(c.bits == 8 for c in context.format.components)


def _check_claim(path: str, container: Any, stream: Any, ends: dict[str, float], first: int) -> None:
    """Compare what the header says with what is there: of the stream or, where it says nothing of it, of all."""
    late = max(0.0, -float(first * stream.time_base))  # a stream may begin before 0
    if stream.duration is not None:
        claimed, found = float(stream.duration * stream.time_base), ends["video"] + late
    else:
        claimed, found = float(container.duration or 0) / 1e6, ends["all"] + late
    if claimed > found + MISSING_TAIL:
        raise MediaError(f"{path}: ends at {found:.2f} s, its header says {claimed:.2f} s: cut short")


def _closed(packets: list[tuple[int, bool, bool]]) -> bool:
    """Whether no frame is shown before the key frame that it comes after."""
    latest = packets[0][0]
    for pts, key, _ in packets:
        if key:
            latest = pts
        elif pts < latest:
            return False
    return packets[0][1]


def _first_frame(path: str) -> tuple[int, int, tuple[int, int, int, int]]:
    """Height and width as shown, and the turn."""
    from av.sidedata.sidedata import Type

    with _opened(path) as (container, stream, _):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError(f"{path}: no frame could be decoded")
        matrix = next((bytes(side) for side in frame.side_data if side.type == Type.DISPLAYMATRIX), None)
        a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.sign(np.frombuffer(matrix, np.int32, 5)).tolist()
    if abs(a) + abs(b) != 1 or abs(a) != abs(d) or abs(b) != abs(c):
        raise MediaError(f"{path}: turned by other than a quarter turn")
    size = (frame.height, frame.width) if a else (frame.width, frame.height)
    return (*size, (a, b, c, d))


def _turned(pixels: Pixels, turn: tuple[int, int, int, int]) -> Pixels:
    a, b, c, d = turn
    if not a:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: b + d, :: a + c]


# --- frames ----------------------------------------------------------------------------------------------------------


def read_decord(path: str, line: Timeline, numbers: npt.NDArray[np.int64]) -> Pixels | None:
    """Frames by their numbers, [T, H, W, 3]; None if decord fails, complains, or has other times than the packets."""
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    with complaints() as said:
        try:
            reader = decord.VideoReader(path, num_threads=1)
            begins = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
            if len(begins) != len(line.begins) or not np.allclose(begins, line.begins * line.unit, atol=ROUNDING):
                return None
            pixels: Pixels = reader.get_batch(numbers).asnumpy()
            del reader
        except (decord.DECORDError, RuntimeError, ValueError):
            return None
    return None if said else pixels


def read_pyav(path: str, line: Timeline, numbers: npt.NDArray[np.int64]) -> Pixels:
    """Frames by their numbers, [T, H, W, 3].

    Raises:
        MediaError: one of them cannot be decoded, or the decoder complains before it comes to the last.
    """
    import av

    wanted = line.begins[numbers].tolist()
    keys = line.keys[line.keys <= min(wanted)]
    try:
        found = _pass(path, line, set(wanted), int(keys[-1]) if len(keys) > 1 else None)
    except (MediaError, av.error.FFmpegError):
        if len(keys) <= 1:
            raise
        found = _pass(path, line, set(wanted), None)  # the seek may be what went wrong
    return np.stack([found[pts] for pts in wanted])


def _pass(path: str, line: Timeline, wanted: set[int], key: int | None) -> dict[int, Pixels]:
    """The frames that begin at `wanted`, by decoding from the key frame at `key` on, or from the start."""
    found: dict[int, Pixels] = {}
    last: int | None = None
    with _opened(path) as (container, stream, said):
        if key is not None:
            container.seek(key, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise MediaError(f"{path}: frames whose times do not rise; remux it into another container")
            last = frame.pts
            if last in wanted:
                found[last] = _turned(frame.to_ndarray(format="rgb24"), line.turn)
            if len(found) == len(wanted):
                break
    if said:
        raise MediaError(f"{path}: damaged ({said[0][1]})")
    if wanted - set(found):
        missing = (min(wanted - set(found)) - int(line.begins[0])) * line.unit
        raise MediaError(f"{path}: the frame at {missing:.2f} s cannot be decoded")
    return found


@contextmanager
def complaints() -> Iterator[list[tuple[str, str]]]:
    """(who, what) for each line that libav writes to the standard error meanwhile; filled when the block ends."""
    import av

    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)
    said: list[tuple[str, str]] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            said += COMPLAINT.findall(file.read().decode(errors="replace"))
