"""Frames of one video file at some of its times, decoded in this process.

Which frame is wanted is read off the packets (`shards.timeline`); a decoder only has to deliver the frame of that time.
PyAV names the time of each frame that it gives. decord does not: it counts frames, and miscounts them without an error
after a seek to a key frame with leading pictures, in files with an edit list, and where decoding does not start at 0.
It is used where nothing of that kind is in the file and its own times are those of the packets; PyAV takes all others,
those that are to be turned or have odd sizes or ten bits, and those that decord 0.6 cannot read.

Decoders conceal damage, and only write to the standard error about it: what they write there sends a file from decord
to PyAV, and ends it with PyAV. Deadlines, clips of a video and folders of images are `shards.media`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.media import ROUNDING, Frames, MediaError, Pixels, check_end
from shards.timeline import Timeline, Turn, complaints, opened, read_timeline


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


def _turned(pixels: Pixels, turn: Turn) -> Pixels:
    a, b, c, d = turn
    if not a:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: b + d, :: a + c]


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

    wanted = np.unique(line.begins[numbers])
    try:
        found = _pass(path, line, _stretches(line, wanted))
    except (MediaError, av.error.FFmpegError):
        found = _pass(path, line, [(None, wanted)])  # a seek may be what went wrong
    return np.stack([found[int(line.begins[number])] for number in numbers])


def _stretches(line: Timeline, wanted: npt.NDArray[np.int64]) -> list[tuple[int | None, npt.NDArray[np.int64]]]:
    """Times to be decoded in one go, each time with the key frame to begin at: none lies unused between them."""
    after = np.searchsorted(line.keys, wanted, side="right") - 1
    parts = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(after) > 1) + 1)
    return [(int(line.keys[after[p[0]]]) if after[p[0]] > 0 else None, wanted[p]) for p in parts]


def _pass(path: str, line: Timeline, stretches: list[tuple[int | None, npt.NDArray[np.int64]]]) -> dict[int, Pixels]:
    """Frames by the time at which they begin."""
    found: dict[int, Pixels] = {}
    with opened(path) as (container, stream, said):
        for key, wanted in stretches:
            if key is not None:
                container.seek(key, stream=stream)
            found |= _take(path, line, container.decode(stream), set(wanted.tolist()))
    if said:
        raise MediaError(f"{path}: damaged ({said[0][1]})")
    return found


def _take(path: str, line: Timeline, frames: Iterator[Any], wanted: set[int]) -> dict[int, Pixels]:
    found: dict[int, Pixels] = {}
    last: int | None = None
    for frame in frames:
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise MediaError(f"{path}: frames whose times do not rise; remux it into another container")
        last = frame.pts
        if last in wanted:
            found[last] = _turned(frame.to_ndarray(format="rgb24"), line.turn)
            if len(found) == len(wanted):
                return found
    missing = (min(wanted - set(found)) - int(line.begins[0])) * line.unit
    raise MediaError(f"{path}: the frame at {missing:.2f} s cannot be decoded")
