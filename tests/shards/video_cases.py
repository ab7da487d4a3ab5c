"""Small videos whose frames carry their number, and the ways in which files of the wild are awkward or damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

BITS = 8
RATE = 25
NUM = 50  # frames of a whole video: two seconds
KEYS = 10  # frames between key frames

Pixels = npt.NDArray[np.uint8]


def picture(number: int, size: tuple[int, int]) -> Pixels:
    """Frame `number`, RGB [height, width, 3] of `size` = (width, height): its bits on top, moving texture below."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    texture = 128 + 80 * np.sin((columns + 3 * number) / 5) * np.cos((rows - number) / 7)
    noise = np.random.Generator(np.random.Philox(number)).normal(0, 6, (height, width))
    grey = np.clip(texture + noise, 0, 255)
    band = np.array([number >> bit & 1 for bit in range(BITS)]) * 255
    grey[: height // 4] = band[np.minimum(np.arange(width) * BITS // width, BITS - 1)]
    pixels = np.stack([grey, 255 - grey, np.full_like(grey, 90)], axis=-1).astype(np.uint8)
    pixels[: height // 4] = grey[: height // 4, :, None].astype(np.uint8)
    return pixels


def number_of(pixels: Pixels) -> int:
    """The number that a decoded frame carries."""
    height, width, _ = pixels.shape
    cells = [
        pixels[height // 16 : height // 6, width * b // BITS + 2 : width * (b + 1) // BITS - 2] for b in range(BITS)
    ]
    return sum((float(cell.mean()) > 128) << bit for bit, cell in enumerate(cells))


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (64, 64),
    numbers: Sequence[int] = range(NUM),
    pix_fmt: str = "yuv420p",
    times: Callable[[int], int] | None = None,
    rotation: int | None = None,
    audio: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A video of the pictures `numbers`, and `audio` seconds of a tone.

    `times` gives the milliseconds of the i-th frame where the rate is not constant.
    """
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(path), "w", options=container or {}) as write:
        stream = write.add_stream(codec, rate=1000 if times else RATE, options=quiet | (options or {}))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = KEYS
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = write.add_stream("aac", rate=8000, layout="mono") if audio else None
        for index, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts = times(index) if times else index
            write.mux(stream.encode(frame))
        write.mux(stream.encode())
        if sound is not None:
            write.mux(_tone(sound, audio))
    return path


def encode_tone(path: Path, seconds: int) -> Path:
    """A file without a picture."""
    with av.open(str(path), "w") as write:
        write.mux(_tone(write.add_stream("aac", rate=8000, layout="mono"), seconds))
    return path


def _tone(stream: av.AudioStream, seconds: int) -> list[av.Packet]:
    wave = np.sin(np.arange(8000 * seconds) / 5).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 8000, 0
    return [*stream.encode(frame), *stream.encode()]


def cut(
    source: Path,
    target: Path,
    key: int,
    seconds: float,
    *,
    negative: str = "disabled",
    options: dict[str, str] | None = None,
) -> Path:
    """Copy the packets from number `key` on, with times that begin at `seconds`, as `ffmpeg -ss … -c copy` does."""
    with (
        av.open(str(source)) as read,
        av.open(str(target), "w", options={"avoid_negative_ts": negative} | (options or {})) as write,
    ):
        stream, taken = write.add_stream_from_template(read.streams.video[0]), read.streams.video[0]
        ticks = round(seconds / taken.time_base)
        for packet in [packet for packet in read.demux(taken) if packet.size][key:]:
            packet.stream, packet.pts, packet.dts = stream, packet.pts - ticks, packet.dts - ticks
            write.mux(packet)
    return target


def copy_with_junk(source: Path, target: Path, count: int) -> Path:
    """An H.264 file that says it has `count` frames more than can be decoded: their packets hold a delimiter only."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream, taken = write.add_stream_from_template(read.streams.video[0]), read.streams.video[0]
        packets = [packet for packet in read.demux(taken) if packet.size]
        step, last = packets[0].duration, max(packet.pts for packet in packets)
        for number in range(count):
            junk = av.Packet(b"\0\0\0\2\x09\x30")
            junk.time_base, junk.duration = taken.time_base, step
            junk.pts, junk.dts = last + (number + 1) * step, packets[-1].dts + step
            packets.append(junk)
        for packet in packets:
            packet.stream = stream
            write.mux(packet)
    return target


def key_packets(path: Path) -> list[int]:
    """Which packets, in the order of the file, are key frames."""
    with av.open(str(path)) as read:
        packets = [packet for packet in read.demux(read.streams.video[0]) if packet.size]
        return [number for number, packet in enumerate(packets) if packet.is_keyframe]


def packet_places(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each video packet in the file."""
    with av.open(str(path)) as read:
        return [(packet.pos, packet.size) for packet in read.demux(read.streams.video[0]) if packet.size]


def overwrite(path: Path, start: int, data: bytes) -> Path:
    """The file with other bytes from `start` on."""
    content = path.read_bytes()
    path.write_bytes(content[:start] + data + content[start + len(data) :])
    return path


def all_frames(path: Path) -> list[tuple[float, Pixels]]:
    """Every frame that PyAV decodes from start to end, with its time of presentation from the first packet shown."""
    with av.open(str(path)) as read:
        stream = read.streams.video[0]
        first = min(float(p.pts * p.time_base) for p in read.demux(stream) if p.size and not p.is_discard)
    with av.open(str(path)) as read:
        return [(f.time - first, f.to_ndarray(format="rgb24")) for f in read.decode(read.streams.video[0])]
