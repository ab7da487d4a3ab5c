"""Decoding the frames of one video file at given times, in this process.

The packets determine the frame of each time (`shards.media.timeline`); a decoder only has to deliver that frame. PyAV
reports the time of each frame. decord does not: it counts frames, and miscounts them without an error after a seek to
a key frame with leading pictures, in files with an edit list, and if decoding does not start at time 0. decord is used
only for files without these traps whose times it reports as the packets do. PyAV decodes all other files: rotated ones,
odd sizes, ten bits, and those that decord 0.6 cannot read.

Decoders conceal damage and only log it to the standard error. After such a message, a file that decord read is decoded
again with PyAV; after one with PyAV it is rejected. Deadlines, clips and folders of images: `shards.media.video`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.media.timeline import Timeline, Turn, complaints, opened, read_timeline
from shards.media.types import ROUNDING, Frames, Make, MediaError, Pixels, check_end

Stretch = tuple[int | None, list[int]]  # time of the key frame to seek to (None: no seek), and times to decode after it
BLOCK = 2**28  # bytes of frames per call of decord; smaller blocks decode again from a key frame more often


def decode(path: str, times: npt.NDArray[np.float64], make: Make) -> Frames:
    """Decode the frames shown at `times` (seconds from the first frame) and apply `make` to each.

    Raises:
        MediaError: see `read_timeline`; or a frame cannot be decoded.
    """
    line = read_timeline(path)
    check_end(path, line.duration, times)
    numbers = line.at(times)
    wanted, decoder = np.unique(numbers), "decord"
    frames = read_decord(path, line, wanted, make) if line.countable else None
    if frames is None:
        frames, decoder = read_pyav(path, line, wanted, make), "pyav"
    return Frames(each=[frames[number] for number in numbers.tolist()], decoder=decoder)


def read_decord(path: str, line: Timeline, wanted: npt.NDArray[np.int64], make: Make) -> dict[int, Any] | None:
    """Decode frames by number with decord; None if it fails, logs an error, or reports other times than the packets."""
    import decord

    decord.logging.set_level(decord.logging.ERROR)
    frames: dict[int, Any] = {}
    with complaints() as messages:
        try:
            reader = decord.VideoReader(path, num_threads=1)
            begins = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
            if len(begins) != len(line.begins) or not np.allclose(begins, line.begins * line.unit, atol=ROUNDING):
                return None
            size = max(1, BLOCK // (3 * line.height * line.width))
            for first in range(0, len(wanted), size):
                block = wanted[first : first + size]
                pixels = reader.get_batch(block).asnumpy()
                frames |= {int(number): make(frame) for number, frame in zip(block, pixels, strict=True)}
            del reader
        except (decord.DECORDError, RuntimeError, ValueError):
            return None
    return None if messages else frames


def read_pyav(path: str, line: Timeline, wanted: npt.NDArray[np.int64], make: Make) -> dict[int, Any]:
    """Decode frames by number with PyAV.

    Raises:
        MediaError: a frame cannot be decoded, or the decoder logs an error before the last one.
    """
    import av

    times = line.begins[wanted]
    stretches = _stretches(line, times)
    everything: list[Stretch] = [(None, times.tolist())]
    try:
        frames = _decode_stretches(path, line, stretches, make)
    except (MediaError, av.error.FFmpegError):
        if stretches == everything:
            raise
        frames = _decode_stretches(path, line, everything, make)  # without seeks: a seek may be the cause
    return {int(number): frames[int(line.begins[number])] for number in wanted}


def _stretches(line: Timeline, times: npt.NDArray[np.int64]) -> list[Stretch]:
    """Group times into stretches that are decoded without a seek: no group of pictures in a stretch is unused."""
    after = np.searchsorted(line.keys, times, side="right") - 1
    runs = np.split(np.arange(len(times)), np.flatnonzero(np.diff(after) > 1) + 1)
    return [(int(line.keys[after[p[0]]]) if after[p[0]] > 0 else None, times[p].tolist()) for p in runs]


def _decode_stretches(path: str, line: Timeline, stretches: list[Stretch], make: Make) -> dict[int, Any]:
    """Decode stretches in order; frames by their presentation time."""
    decoded: dict[int, Any] = {}
    with opened(path) as (container, stream, messages):
        for key, times in stretches:
            if key is not None:
                container.seek(key, stream=stream)
            decoded |= _take(path, line, container.decode(stream), set(times), make)
    if messages:
        raise MediaError(f"{path}: damaged ({messages[0][1]})")
    return decoded


def _take(path: str, line: Timeline, frames: Iterator[Any], wanted: set[int], make: Make) -> dict[int, Any]:
    """Decode until all `wanted` presentation times were seen."""
    taken: dict[int, Any] = {}
    last: int | None = None
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise MediaError(f"{path}: frames whose times do not rise; remux it into another container")
        last = frame.pts
        if last in wanted:
            taken[last] = make(_turned(frame.to_ndarray(format="rgb24"), line.turn))
            if len(taken) == len(wanted):
                return taken
    missing = (min(wanted - set(taken)) - int(line.begins[0])) * line.unit
    raise MediaError(f"{path}: the frame at {missing:.2f} s cannot be decoded")


def _turned(pixels: Pixels, turn: Turn) -> Pixels:
    """Rotate and mirror pixels by a display matrix."""
    a, b, c, d = turn
    if not a:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: b + d, :: a + c]
