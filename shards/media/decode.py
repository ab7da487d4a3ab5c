"""Frames of one video file at some of its times, decoded in this process.

The packets say which frame is wanted (`shards.media.timeline`); a decoder only has to deliver the frame of that time.
PyAV names the time of each frame that it gives. decord does not: it counts frames, and miscounts them without an error
after a seek to a key frame with leading pictures, in files with an edit list, and where decoding does not start at 0.
It is used where nothing of that kind is in the file and its own times are those of the packets; PyAV takes all others,
those that are to be turned or have odd sizes or ten bits, and those that decord 0.6 cannot read.

Decoders conceal damage, and only write to the standard error about it: what they write there sends a file from decord
to PyAV, and ends it with PyAV. Deadlines, clips of a video and folders of images are `shards.media.video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.media.timeline import Timeline, Turn, complaints, opened, read_timeline
from shards.media.types import ROUNDING, Frames, Make, MediaError, Pixels, check_end

Stretch = tuple[int | None, list[int]]  # a key frame to seek, and times
BLOCK = 2**28  # bytes of the frames that decord gives at once: for each block it decodes from a key frame on


def decode(path: str, times: npt.NDArray[np.float64], make: Make) -> Frames:
    """What `make` makes of the frames shown at `times`, seconds from the first frame.

    Raises:
        MediaError: as in `read_timeline`, or a frame that cannot be decoded.
    """
    line = read_timeline(path)
    check_end(path, line.duration, times)
    numbers = line.at(times)
    wanted, decoder = np.unique(numbers), "decord"
    made = read_decord(path, line, wanted, make) if line.countable else None
    if made is None:
        made, decoder = read_pyav(path, line, wanted, make), "pyav"
    return Frames(each=[made[number] for number in numbers.tolist()], decoder=decoder)


def read_decord(path: str, line: Timeline, wanted: npt.NDArray[np.int64], make: Make) -> dict[int, Any] | None:
    """Frames by their numbers; None if decord fails, complains, or has other times than the packets."""
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    made: dict[int, Any] = {}
    with complaints() as said:
        try:
            reader = decord.VideoReader(path, num_threads=1)
            begins = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
            if len(begins) != len(line.begins) or not np.allclose(begins, line.begins * line.unit, atol=ROUNDING):
                return None
            size = max(1, BLOCK // (3 * line.height * line.width))
            for first in range(0, len(wanted), size):
                block = wanted[first : first + size]
                pixels = reader.get_batch(block).asnumpy()
                made |= {int(number): make(frame) for number, frame in zip(block, pixels, strict=True)}
            del reader
        except (decord.DECORDError, RuntimeError, ValueError):
            return None
    return None if said else made


def read_pyav(path: str, line: Timeline, wanted: npt.NDArray[np.int64], make: Make) -> dict[int, Any]:
    """Frames by their numbers.

    Raises:
        MediaError: one of them cannot be decoded, or the decoder complains before it comes to the last.
    """
    import av

    times = line.begins[wanted]
    stretches = _stretches(line, times)
    everything: list[Stretch] = [(None, times.tolist())]
    try:
        found = _pass(path, line, stretches, make)
    except (MediaError, av.error.FFmpegError):
        if stretches == everything:
            raise
        found = _pass(path, line, everything, make)  # a seek may be what went wrong
    return {int(number): found[int(line.begins[number])] for number in wanted}


def _stretches(line: Timeline, times: npt.NDArray[np.int64]) -> list[Stretch]:
    """Times to be decoded in one go, each time with the key frame to begin at: none lies unused between them."""
    after = np.searchsorted(line.keys, times, side="right") - 1
    parts = np.split(np.arange(len(times)), np.flatnonzero(np.diff(after) > 1) + 1)
    return [(int(line.keys[after[p[0]]]) if after[p[0]] > 0 else None, times[p].tolist()) for p in parts]


def _pass(path: str, line: Timeline, stretches: list[Stretch], make: Make) -> dict[int, Any]:
    """Frames by the time at which they begin."""
    found: dict[int, Any] = {}
    with opened(path) as (container, stream, said):
        for key, times in stretches:
            if key is not None:
                container.seek(key, stream=stream)
            found |= _take(path, line, container.decode(stream), set(times), make)
    if said:
        raise MediaError(f"{path}: damaged ({said[0][1]})")
    return found


def _take(path: str, line: Timeline, frames: Iterator[Any], wanted: set[int], make: Make) -> dict[int, Any]:
    found: dict[int, Any] = {}
    last: int | None = None
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise MediaError(f"{path}: frames whose times do not rise; remux it into another container")
        last = frame.pts
        if last in wanted:
            found[last] = make(_turned(frame.to_ndarray(format="rgb24"), line.turn))
            if len(found) == len(wanted):
                return found
    missing = (min(wanted - set(found)) - int(line.begins[0])) * line.unit
    raise MediaError(f"{path}: the frame at {missing:.2f} s cannot be decoded")


def _turned(pixels: Pixels, turn: Turn) -> Pixels:
    a, b, c, d = turn
    if not a:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: b + d, :: a + c]
