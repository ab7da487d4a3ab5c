"""Videos: facts and frames, from files or folders of images. Which frames a model wants is not decided here.

A video is decoded in a child process with a deadline, since decoders can hang while they hold the interpreter; a
child that is late is killed. Which decoder reads it, and which of its frames are taken, is `shards.media.decode`.
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

DEADLINE = 120.0  # seconds for one video
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
DIGITS = re.compile(r"(\d+)")


def probe_video(ref: VideoRef, deadline: float = DEADLINE) -> VideoInfo:
    """Facts of a video or clip.

    Raises:
        MediaError: missing, not a video, or not read within `deadline` seconds.
    """
    info: VideoInfo = _in_child(_probe, deadline, ref)
    return info


def read_frames(ref: VideoRef, times: Sequence[float], make: Make | None = None, deadline: float = DEADLINE) -> Frames:
    """The frames shown at `times`, seconds from the start of the clip: for each the last one that begins no later.

    With `make`, a function that can be pickled, they stay in the decoding process, one at a time, and what it makes of
    each comes back: frames at full size fill gigabytes, and take as long to send as a tenth of decoding them.

    Raises:
        MediaError: missing, damaged, shorter than it says, or not decoded within `deadline` seconds.
    """
    frames: Frames = _in_child(_read, deadline, ref, tuple(times), make or _same)
    return frames


def _same(pixels: Pixels) -> Pixels:
    return pixels


def _clip(ref: VideoRef, whole: float) -> float:
    """Seconds of the clip in a video of `whole` seconds."""
    start, end = ref.start or 0.0, whole if ref.end is None else min(ref.end, whole)
    if end <= start:
        raise MediaError(f"{ref.path}: clip {start} to {end} s of a video of {whole:.2f} s is empty")
    return end - start


def _frame_files(ref: VideoRef) -> list[Path]:
    """The images of a folder, numbers in their names by value: 2.jpg comes before 10.jpg."""
    files = [path for path in Path(ref.path).iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
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
    made: dict[int, Any] = {}
    shapes = set()
    for number in np.unique(numbers).tolist():
        frame = load_image(ImageRef(path=str(files[number])))
        shapes.add(frame.shape)
        made[number] = make(frame)
    if len(shapes) > 1:
        raise MediaError(f"{ref.path}: frames of several sizes")
    return Frames(each=[made[number] for number in numbers.tolist()], decoder="pillow")


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
    """Answer (function, arguments) until the pipe closes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: builders have a process per core
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
