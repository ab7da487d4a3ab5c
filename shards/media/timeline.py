"""The timeline of a video file: what its packets say, before any frame is decoded.

Packets carry the times of presentation, so they say which frame is shown when, where decoding can start, what an edit
list hides, and whether what the header promises is there. Damage is looked for here as far as packets show it: the
demuxer's complaints, packets that are cut off, and holes of zeros, which VP8 and VP9 take for a picture. Decoding is
`shards.media.decode`.
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

COUNTED_BY_DECORD = {"h264", "hevc", "vp8", "vp9", "mpeg4"}
HOLE = bytes(64)  # of a disk or a download
DENSE = COUNTED_BY_DECORD | {"av1", "libdav1d"}  # whose entropy coding leaves no such run
COMPLAINT = re.compile(r"\[([^\]]+) @ 0x[0-9a-f]+\] *(.+)")
UPRIGHT = (1, 0, 0, 1)

Turn = tuple[int, int, int, int]
Packet = tuple[int, bool, bool]  # its time, whether it is a key frame, whether it is hidden; in order of decoding
Shape = tuple[int, int, Turn]  # height and width as shown


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
    turn: Turn
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


@functools.lru_cache(maxsize=1)  # a video is probed, then read
def _timeline(path: str, size: int, changed: int) -> Timeline:
    with opened(path) as (container, stream, said):
        packets, end, shape = _packets(path, container, stream)
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
    height, width, turn = shape
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


def _packets(path: str, container: Any, stream: Any) -> tuple[list[Packet], float, Shape]:
    """The packets of the stream, the second at which the last one ends, and the shape of the first frame."""
    packets, shape, ends = list[Packet](), None, dict[int, int]()
    step = round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 0
    index, unit, dense = stream.index, stream.time_base, stream.codec_context.name in DENSE
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
            if packet.is_corrupt or (dense and HOLE in bytes(packet)):
                what = "is cut off" if packet.is_corrupt else "has a hole of zeros"
                raise MediaError(f"{path}: damaged, the packet at {float(pts * unit):.2f} s {what}")
    if shape is None:
        raise MediaError(f"{path}: no frame could be decoded")
    seconds = {number: float(end * container.streams[number].time_base) for number, end in ends.items()}
    first = min((pts for pts, _, hidden in packets if not hidden), default=0)
    _check_claim(path, container, stream, seconds, float(first * unit))
    return packets, seconds[index], shape


def _shape(path: str, packet: Any) -> Shape | None:
    """Height and width as shown, and the turn; None if no frame comes out."""
    import av
    from av.sidedata.sidedata import Type

    codec = packet.stream.codec_context
    try:
        frame = next(iter(codec.decode(packet) or codec.decode(None)), None)  # at once, not when its order is known
    except av.error.FFmpegError:  # it may begin with pictures that refer to what was cut away
        frame = None
    codec.flush_buffers()
    if frame is None:
        return None
    matrix = next((bytes(side) for side in frame.side_data if side.type == Type.DISPLAYMATRIX), None)
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.sign(np.frombuffer(matrix, np.int32, 5)).tolist()
    if abs(a) + abs(b) != 1 or abs(a) != abs(d) or abs(b) != abs(c):
        raise MediaError(f"{path}: turned by other than a quarter turn")
    return (*((frame.height, frame.width) if a else (frame.width, frame.height)), (a, b, c, d))


def _plain_colours(stream: Any) -> bool:
    """Whether decord and PyAV make the same RGB: of 8 bits, and of rows and columns that halve."""
    context = stream.codec_context
    return not (context.width % 2 or context.height % 2) and all(c.bits == 8 for c in context.format.components)


def _check_claim(path: str, container: Any, stream: Any, ends: dict[int, float], first: float) -> None:
    """Compare what the header says with what is there: of the stream or, where it says nothing of it, of all."""
    if stream.duration is not None:
        claimed, found = float(stream.duration * stream.time_base), ends[stream.index]
    else:
        claimed, found = float(container.duration or 0) / 1e6, max(ends.values())
    found -= min(first, 0.0)
    if claimed > found + MISSING_TAIL:
        raise MediaError(f"{path}: ends at {found:.2f} s, its header says {claimed:.2f} s: cut short")


def _closed(packets: list[Packet]) -> bool:
    """Whether no frame is shown before the key frame that it comes after."""
    latest = packets[0][0]
    for pts, key, _ in packets:
        if key:
            latest = pts
        elif pts < latest:
            return False
    return packets[0][1]


@contextmanager
def opened(path: str) -> Iterator[tuple[Any, Any, list[tuple[str, str]]]]:
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
