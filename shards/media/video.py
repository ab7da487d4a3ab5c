"""Reading videos: properties and frames, from video files or folders of images.

A video is decoded in a child process with a deadline, because decoders can hang while they hold the GIL; a child that
misses its deadline is killed. `shards.media.decode` selects the decoder and the frames of a file; the processor decides
the times.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from shards.media.decode import decode
from shards.media.images import load_image
from shards.media.timeline import read_timeline
from shards.media.types import ROUNDING, Frames, Make, MediaError, Pixels, VideoInfo, check_end
from shards.schema import ImageRef, VideoRef

DEADLINE = 120.0  # seconds for one call on one video
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
DIGITS = re.compile(r"(\d+)")


def probe_video(ref: VideoRef, deadline: float = DEADLINE) -> VideoInfo:
    """Read the properties of a video or clip.

    Raises:
        MediaError: the file is missing, not a video, or was not read within `deadline` seconds.
    """
    info: VideoInfo = _in_child(_probe, deadline, ref)
    return info


def read_frames(ref: VideoRef, times: Sequence[float], make: Make | None = None, deadline: float = DEADLINE) -> Frames:
    """Read the frames shown at `times` (seconds from the start of the clip): the last frame that begins no later.

    `make`, a picklable function, is applied to each frame in the decoding process, and only its results are returned:
    full-size frames take gigabytes of memory, and sending them takes a tenth of the time of decoding.

    Raises:
        MediaError: the file is missing, damaged or truncated, or was not decoded within `deadline` seconds.
    """
    frames: Frames = _in_child(_read, deadline, ref, tuple(times), make or _same)
    return frames


def _same(pixels: Pixels) -> Pixels:
    return pixels


def _clip(ref: VideoRef, whole: float) -> float:
    """Duration of the clip in seconds, in a video of `whole` seconds."""
    start, end = ref.start or 0.0, whole if ref.end is None else min(ref.end, whole)
    if end <= start:
        raise MediaError(f"{ref.path}: clip {start} to {end} s of a video of {whole:.2f} s is empty")
    return end - start


def _frame_files(ref: VideoRef) -> list[Path]:
    """The images of a folder in natural order of their names: 2.jpg comes before 10.jpg."""
    paths = (path for path in Path(ref.path).iterdir() if not path.name.startswith("._"))  # files of macOS
    files = [path for path in paths if path.suffix.lower() in FRAME_SUFFIXES]
    if not files:
        raise MediaError(f"{ref.path}: no frames ({', '.join(FRAME_SUFFIXES)}) in the folder")
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in DIGITS.split(path.name)])


def _probe_folder(ref: VideoRef, fps: float) -> VideoInfo:
    files = _frame_files(ref)
    height, width, _ = load_image(ImageRef(path=str(files[0]))).shape
    duration = _clip(ref, len(files) / fps)
    return VideoInfo(duration=duration, fps=fps, num_frames=len(files), width=width, height=height, codec="images")


def _read_folder(ref: VideoRef, fps: float, times: tuple[float, ...], make: Make) -> Frames:
    files = _frame_files(ref)
    wanted = np.asarray(times, np.float64) + (ref.start or 0.0)
    check_end(ref.path, len(files) / fps, wanted)
    numbers = np.minimum(np.floor((wanted + ROUNDING) * fps).astype(int), len(files) - 1)
    frames: dict[int, Any] = {}
    shapes = set()
    for number in np.unique(numbers).tolist():
        frame = load_image(ImageRef(path=str(files[number])))
        shapes.add(frame.shape)
        frames[number] = make(frame)
    if len(shapes) > 1:
        raise MediaError(f"{ref.path}: frames of several sizes")
    return Frames(each=[frames[number] for number in numbers.tolist()], decoder="pillow")


def _probe(ref: VideoRef) -> VideoInfo:
    if ref.fps is not None:
        return _probe_folder(ref, ref.fps)
    line = read_timeline(ref.path)
    return VideoInfo(
        duration=_clip(ref, line.duration),
        fps=line.fps,
        num_frames=len(line.begins),
        width=line.width,
        height=line.height,
        codec=line.codec,
    )


def _read(ref: VideoRef, times: tuple[float, ...], make: Make) -> Frames:
    if ref.fps is not None:
        return _read_folder(ref, ref.fps, times, make)
    return decode(ref.path, np.asarray(times, np.float64) + (ref.start or 0.0), make)


# --- the child process -----------------------------------------------------------------------------------------------


def _serve(connection: Connection, parent: int) -> None:
    """Loop of the child: receive (function, arguments), send the result, until the pipe closes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it on import; builders have a process per core
    while os.getppid() == parent:
        try:
            function, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: Any = function(*arguments)
        except Exception as error:  # any error of a decoder becomes a MediaError of the caller
            answer = MediaError(str(error) if isinstance(error, MediaError) else f"{arguments[0].path}: {error}")
        connection.send(answer)


class _Child:
    """The decoding process of this process; it is started on demand, and again after it was killed."""

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
    if not (Path(ref.path).is_file() if ref.fps is None else Path(ref.path).is_dir()):
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
