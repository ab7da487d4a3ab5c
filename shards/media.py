"""Images and videos: decode, probe, encode. What a model wants of them (sizes, frame times) is not decided here.

A video is decoded in a child process with a deadline, since decoders can hang while they hold the interpreter; a
child that is late is killed. decord comes first, PyAV takes the files that decord cannot be trusted with: those that
it fails to open, whose frame count it gets wrong, and those that do not start at time 0 (an edit list), for which
decord returns wrong frames without an error.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import simplejpeg

from shards.schema import ImageRef, VideoRef

Pixels = npt.NDArray[np.uint8]
MAX_PIXELS = 200_000_000  # of one image
DEADLINE = 120.0  # seconds for one video


class MediaError(ValueError):
    """An image or a video that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """Facts of a video, or of the clip that a `VideoRef` cuts out of it: duration in seconds, fps of the stream."""

    duration: float
    fps: float
    num_frames: int
    width: int
    height: int
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Decoded frames uint8 [T, H, W, 3], and the name of the decoder that made them."""

    pixels: Pixels
    decoder: str


# --- images ----------------------------------------------------------------------------------------------------------


def load_image(ref: ImageRef) -> Pixels:
    """An image as RGB uint8 [H, W, 3], turned as its EXIF orientation says.

    Raises:
        MediaError: missing, too large, or not an image.
    """
    where = ref.path if ref.path is not None else "embedded image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(ref.path if ref.path is not None else io.BytesIO(ref.data or b"")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise MediaError(f"{where}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
                return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise MediaError(f"{where}: no such image") from None
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise MediaError(f"{where}: not a readable image ({error})") from None


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """JPEG 4:4:4 of RGB uint8 [H, W, 3]."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444", fastdct=False)
    return data


def decode_jpeg(data: bytes) -> Pixels:
    """RGB uint8 [H, W, 3] of a JPEG, by the exact (not the fast) DCT: equal to Pillow's result.

    Raises:
        ValueError: not a JPEG.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return pixels


# --- videos ----------------------------------------------------------------------------------------------------------


def probe_video(ref: VideoRef, deadline: float = DEADLINE) -> VideoInfo:
    """Facts of a video or clip.

    Raises:
        MediaError: missing, not a video, or not read within `deadline` seconds.
    """
    info: VideoInfo = _in_child(_probe, deadline, ref)
    return info


def read_frames(ref: VideoRef, times: Sequence[float], deadline: float = DEADLINE) -> Frames:
    """The frames shown at `times`, seconds from the start of the clip.

    Raises:
        MediaError: missing, damaged, or not decoded within `deadline` seconds.
    """
    frames: Frames = _in_child(_read, deadline, ref, tuple(times))
    return frames


def _probe(ref: VideoRef) -> VideoInfo:
    import av

    with av.open(ref.path) as container:
        if not container.streams.video:
            raise MediaError(f"{ref.path}: no video stream")
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if stream.duration is not None and stream.time_base is not None:
            whole = float(stream.duration * stream.time_base)
        else:
            whole = float(container.duration or 0) / 1e6
        if fps <= 0 or whole <= 0:
            raise MediaError(f"{ref.path}: no frame rate or no duration in the file")
        start, end = ref.start or 0.0, whole if ref.end is None else min(ref.end, whole)
        if end <= start:
            raise MediaError(f"{ref.path}: clip {start} to {end} s of a video of {whole:.2f} s is empty")
        return VideoInfo(
            duration=end - start,
            fps=fps,
            num_frames=stream.frames or round(whole * fps),
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            codec=stream.codec_context.name,
        )


def _read(ref: VideoRef, times: tuple[float, ...]) -> Frames:
    import decord

    wanted = np.asarray(times, np.float64) + (ref.start or 0.0)
    if _trustworthy(ref.path):
        try:
            return Frames(pixels=_read_decord(ref.path, wanted), decoder="decord")
        except (decord.DECORDError, RuntimeError, ValueError):
            pass  # PyAV decides whether the file is readable, and its error is the one that is told
    return Frames(pixels=_read_pyav(ref.path, wanted), decoder="pyav")


def _trustworthy(path: str) -> bool:
    """Whether decord's frame numbers can be believed: the stream starts at 0 and is not AV1."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        first = next((packet.pts for packet in container.demux(stream) if packet.pts is not None), None)
        return first == 0 and not stream.start_time and stream.codec_context.name not in {"av1", "libdav1d"}


def _read_decord(path: str, wanted: npt.NDArray[np.float64]) -> Pixels:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    ends = reader.get_frame_timestamp(np.arange(len(reader)))[:, 1]
    if not (np.diff(ends) > 0).all():
        raise MediaError(f"{path}: frame times do not rise")
    numbers = np.minimum(np.searchsorted(ends, wanted, side="right"), len(reader) - 1)
    pixels: Pixels = reader.get_batch(numbers).asnumpy()
    return pixels


def _read_pyav(path: str, wanted: npt.NDArray[np.float64]) -> Pixels:
    """One pass over the file, keeping for each time the last frame that begins no later."""
    import av

    order = np.argsort(wanted, kind="stable")
    chosen: list[Pixels] = []
    previous, start = None, None
    with av.open(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.time is None:
                continue
            start = frame.time if start is None else start
            while previous is not None and len(chosen) < len(order) and wanted[order[len(chosen)]] < frame.time - start:
                chosen.append(previous.to_ndarray(format="rgb24"))
            previous = frame
            if len(chosen) == len(order):
                break
    if previous is None:
        raise MediaError(f"{path}: no frame could be decoded")
    last = previous.to_ndarray(format="rgb24")
    chosen += [last] * (len(order) - len(chosen))
    result = np.empty((len(order), *last.shape), np.uint8)
    result[order] = chosen
    return result


# --- the child process -----------------------------------------------------------------------------------------------


def _serve(connection: Connection, parent: int) -> None:
    """Answer (function, arguments) until the pipe closes."""
    while os.getppid() == parent:
        try:
            function, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: Any = function(*arguments)
        except Exception as error:  # whatever a decoder raises becomes the caller's MediaError
            answer = MediaError(str(error) if isinstance(error, MediaError) else f"{arguments[0].path}: {error}")
        connection.send(answer)


class _Child:
    """One decoding process, started when first needed and again after it had to be killed."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.owner = os.getpid()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.owner), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], deadline: float, ref: VideoRef, *rest: Any) -> Any:
        try:
            self.connection.send((function, (ref, *rest)))
            if not self.connection.poll(deadline):
                raise MediaError(f"{ref.path}: not decoded within {deadline:.0f} s")
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise MediaError(f"{ref.path}: the decoder crashed") from None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


_child: _Child | None = None


def _in_child(function: Callable[..., Any], deadline: float, ref: VideoRef, *rest: Any) -> Any:
    global _child
    if not Path(ref.path).is_file():
        raise MediaError(f"{ref.path}: no such video")
    if _child is None or _child.owner != os.getpid():  # a forked worker must not talk through its parent's pipe
        _child = _Child()
    try:
        answer = _child.ask(function, deadline, ref, *rest)
    except MediaError:
        _child.stop()
        _child = None
        raise
    if isinstance(answer, MediaError):
        raise answer
    return answer
