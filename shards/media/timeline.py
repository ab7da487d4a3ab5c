"""The timeline of a video file, read from its packets before any frame is decoded.

Packets carry presentation times, so they tell when each frame is shown, where decoding can start, which frames an edit
list hides, and whether the stream is as long as the header says. Damage that packets show is detected here: error
messages of the demuxer, truncated packets, and runs of zeros, which VP8 and VP9 decode without an error. Frames are
decoded by `shards.media.decode`.
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

from shards.media.types import MISSING_TAIL, ROUNDING, MediaError

COUNTED_BY_DECORD = {"h264", "hevc", "vp8", "vp9", "mpeg4"}  # codecs for which decord numbers frames correctly
ZERO_RUN = bytes(64)  # a run of zeros this long marks a hole left by a broken disk or download
# The entropy coding of these codecs never leaves a run of zeros, so a ZERO_RUN in their packets is damage.
CODECS_WITHOUT_ZERO_RUNS = COUNTED_BY_DECORD | {"av1", "libdav1d"}
COMPLAINT = re.compile(r"\[([^\]]+) @ 0x[0-9a-f]+\] *(.+)")  # a line of libav's log: who, what
# libav's names of the containers that are read; none of them names other files.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,apng,h264,hevc,m4v,ivf,obu,av1,mjpeg,nut"
UPRIGHT = (1, 0, 0, 1)  # the display matrix of a video that is not turned

Turn = tuple[int, int, int, int]
Packet = tuple[int, bool, bool]  # presentation time, whether it is a key frame, whether it is hidden
Shape = tuple[int, int, Turn]  # height and width as shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Times and properties of a video, read from its packets.

    Attributes:
        begins: int64 [N], presentation time of each visible frame, ascending, in units of `unit` seconds.
        keys: int64 [K], presentation times of the key frames, where decoding can start, ascending.
        unit: seconds per tick of `begins` and `keys`.
        duration: seconds from the first frame to the end of the last.
        fps: mean rate of the stream.
        width: pixels of a frame as it is shown, after it was turned.
        height: pixels, likewise.
        codec: name of the codec.
        turn: signs (a, b, c, d) of the display matrix, which sends x, y to ax + cy, bx + dy.
        countable: whether decord's frame k is the k-th visible frame, as far as packets tell.
    """

    begins: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    unit: float
    duration: float
    fps: float
    width: int
    height: int
    codec: str
    turn: Turn
    countable: bool

    def at(self, times: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Numbers of the frames shown at `times` (seconds from the first): the last frame that begins no later."""
        begins = (self.begins - self.begins[0]) * self.unit
        return np.maximum(np.searchsorted(begins, times + ROUNDING, side="right") - 1, 0)


def read_timeline(path: str) -> Timeline:
    """Read the timeline of a video in one pass over its packets.

    Raises:
        MediaError: the file is not a video, is damaged or truncated, or has no presentation times.
    """
    state = Path(path).stat()
    return _timeline(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a video is probed and then read, so its timeline is needed twice
def _timeline(path: str, size: int, changed: int) -> Timeline:
    with opened(path) as (container, stream, messages):
        packets, end, shape = _packets(path, container, stream)
        unit, fps = float(stream.time_base), float(stream.average_rate or 0)
        codec = stream.codec_context.name
        demuxer = container.format.name
        plain = not stream.start_time and len(container.streams.video) == 1 and _plain_colours(stream)
    demuxer_errors = [what for who, what in messages if who == demuxer]
    if demuxer_errors:
        raise MediaError(f"{path}: damaged ({demuxer_errors[0]})")
    begins = np.unique(np.array([pts for pts, _, hidden in packets if not hidden], np.int64))
    duration = end - float(begins[0]) * unit if len(begins) else 0.0
    if duration <= 0:
        raise MediaError(f"{path}: no frame or no duration in the video stream")
    height, width, turn = shape
    plain = plain and begins[0] == 0 and len(begins) == len(packets) and turn == UPRIGHT and not messages
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


def _packets(path: str, container: Any, stream: Any) -> tuple[list[Packet], float, Shape]:
    """The packets of the stream as stored, the end of the last one (seconds), and the shape of the first frame."""
    packets, shape, ends = list[Packet](), None, dict[int, int]()
    step = round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 0
    index, unit = stream.index, stream.time_base
    no_zero_runs = stream.codec_context.name in CODECS_WITHOUT_ZERO_RUNS
    for packet in container.demux():
        pts, number = packet.pts, packet.stream_index
        if number == index and shape is None:
            shape = _shape(path, packet)
        if not packet.size or (pts is None and number != index):
            continue
        if pts is None:
            raise MediaError(f"{path}: frames without times of presentation")
        ends[number] = max(ends.get(number, pts), pts + (packet.duration or (step if number == index else 0)))
        if number == index:
            packets.append((pts, packet.is_keyframe, packet.is_discard))
            if packet.is_corrupt or (no_zero_runs and ZERO_RUN in bytes(packet)):
                what = "is cut off" if packet.is_corrupt else "has a hole of zeros"
                raise MediaError(f"{path}: damaged, the packet at {float(pts * unit):.2f} s {what}")
    if shape is None:
        raise MediaError(f"{path}: no frame could be decoded")
    seconds = {number: float(end * container.streams[number].time_base) for number, end in ends.items()}
    first = min((pts for pts, _, hidden in packets if not hidden), default=0)
    _check_claim(path, container, stream, seconds, float(first * unit))
    return packets, seconds[index], shape


def _shape(path: str, packet: Any) -> Shape | None:
    """Height and width as shown, and the turn; None if the packet decodes to no frame."""
    import av
    from av.sidedata.sidedata import Type

    codec = packet.stream.codec_context
    try:
        frame = next(iter(codec.decode(packet) or codec.decode(None)), None)  # flush: do not wait for later packets
    except av.error.FFmpegError:  # the first pictures of a cut video may refer to frames before the cut
        frame = None
    codec.flush_buffers()
    if frame is None:
        return None
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # iterating gives values in PyAV 18 and keys in 19
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.sign(np.frombuffer(bytes(matrix), np.int32, 5)).tolist()
    if abs(a) + abs(b) != 1 or abs(a) != abs(d) or abs(b) != abs(c):
        raise MediaError(f"{path}: turned by other than a quarter turn")
    return (*((frame.height, frame.width) if a else (frame.width, frame.height)), (a, b, c, d))


def _plain_colours(stream: Any) -> bool:
    """Whether decord and PyAV make the same RGB: 8 bits per component, and an even width and height."""
    context = stream.codec_context
    return not (context.width % 2 or context.height % 2) and all(c.bits == 8 for c in context.format.components)


def _check_claim(path: str, container: Any, stream: Any, ends: dict[int, float], first: float) -> None:
    """Compare the duration in the header with the packets: the stream's or, if it has none, the container's.

    Raises:
        MediaError: the packets end more than `MISSING_TAIL` seconds earlier.
    """
    if stream.duration is not None:
        claimed, actual = float(stream.duration * stream.time_base), ends[stream.index]
    else:
        claimed, actual = float(container.duration or 0) / 1e6, max(ends.values())
    actual -= min(first, 0.0)
    if claimed > actual + MISSING_TAIL:
        raise MediaError(f"{path}: ends at {actual:.2f} s, its header says {claimed:.2f} s: cut short")


def _closed(packets: list[Packet]) -> bool:
    """Whether all groups of pictures are closed: no frame is shown before the key frame that it follows in the file."""
    latest = packets[0][0]
    for pts, key, _ in packets:
        if key:
            latest = pts
        elif pts < latest:
            return False
    return packets[0][1]


@contextmanager
def opened(path: str) -> Iterator[tuple[Any, Any, list[tuple[str, str]]]]:
    """Open a video file: the container, its first video stream that is not cover art, and libav's error messages.

    Messages of the opening itself are left out: opening probes streams that are not used. A playlist (m3u8, concat) is
    refused: it names other files, which could lie anywhere.
    """
    import av

    with complaints(), av.open(path, options={"format_whitelist": CONTAINERS}) as container, complaints() as messages:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise MediaError(f"{path}: no video stream")
        streams[0].codec_context.thread_count = 1  # a builder has a process per core
        yield container, streams[0], messages


@contextmanager
def complaints() -> Iterator[list[tuple[str, str]]]:
    """Collect what libav writes to the standard error: a list of (who, what) per line, filled when the block ends."""
    import av

    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)
    messages: list[tuple[str, str]] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            messages += COMPLAINT.findall(file.read().decode(errors="replace"))
