"""Images and videos that mean harm: no other program is started, and no file is opened that they name."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from shards.convert.masks import _mask
from shards.download.connect import FetchError
from shards.download.urls import check_image
from shards.media.images import FORMATS, HEAVY, ORIENTATION, image_size, load_image
from shards.media.timeline import read_timeline
from shards.media.types import MediaError, TooLargeError
from shards.schema import ImageRef, RejectedError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, which leaves a mark when it is started; the mark."""
    mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\n[ $1 = --version ] || /bin/touch {mark}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(PIL.EpsImagePlugin, "gs_binary", None)
    return mark


BINARY_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(EPS), 0, 0, 0, 0) + bytes(2) + EPS


@pytest.mark.parametrize("data", [EPS, EPS.replace(b"EPSF-3.0", b""), BINARY_EPS])
def test_no_image_starts_ghostscript(tmp_path: Path, ghostscript: Path, data: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for ref in (ImageRef(data=data), ImageRef(path=str(path))):
        for use in (load_image, image_size):
            with pytest.raises(MediaError):
                use(ref)
    with pytest.raises(RejectedError):
        _mask(path, None, 0)
    with pytest.raises(FetchError, match="not an image"):
        check_image(data, None)
    assert not ghostscript.exists()


def test_the_trap_works(tmp_path: Path, ghostscript: Path) -> None:
    with contextlib.suppress(OSError), PIL.Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert ghostscript.exists()


def test_every_format_is_one_that_pillow_has() -> None:
    PIL.Image.init()
    assert set(FORMATS) <= set(PIL.Image.OPEN)


@pytest.mark.parametrize("form", FORMATS)
def test_images_of_datasets_are_read(form: str) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(buffer, form)
    assert image_size(ImageRef(data=buffer.getvalue())) == (16, 16)


def dds(code: bytes) -> bytes:
    """A DDS of a pixel format that no decoder knows."""
    head = (
        struct.pack("<7I", 124, 0x1007, 16, 16, 0, 0, 0)
        + bytes(44)
        + struct.pack("<II4s5I", 32, 4, code, 0, 0, 0, 0, 0)
    )
    return b"DDS " + head.ljust(124, b"\0") + bytes(64)


@pytest.mark.parametrize(
    "data",
    [
        *(dds(b"ABCD"), dds(b"DX10"), dds(b"DXT1")[:60]),
        b"\0\0\0\x20ftypavif" + bytes(40),
        struct.pack(">27f", *([1.0] * 27)) + bytes(40),  # SPIDER
        *(b"", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0\xff\xff\xff\xff", b"P6 99999999999 1 255 "),
    ],
    ids=range(11),
)
def test_bytes_that_are_no_image_are_a_recorded_failure(data: bytes) -> None:
    try:
        check_image(data, None)
    except FetchError as error:
        assert error.reason in {"not an image", "too many pixels"}
    with pytest.raises(MediaError):
        load_image(ImageRef(data=data))


SIDE = 6000  # pixels
PEAK = """
import resource, sys
from molmo2.processing.tiling import resize
from shards.media.images import load_with_notes
from shards.schema import ImageRef
resize(load_with_notes(ImageRef(path=sys.argv[1]))[0], (48, 48))  # imports torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    resize(load_with_notes(ImageRef(path=path))[0], (378, 378))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def zeros(bits: int, colour: int, channels: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of `SIDE` x `SIDE` pixels that are 0: a small file that unpacks to a large image."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0)
    pack, row = zlib.compressobj(), bytes(1 + SIDE * bits * channels // 8)
    data = b"".join(pack.compress(row) for _ in range(SIDE)) + pack.flush()
    chunks = ((b"IHDR", head), *extra, (b"IDAT", data), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.slow
def test_a_small_file_of_many_pixels_takes_ten_bytes_a_pixel(tmp_path: Path) -> None:
    """The conversion made 20 bytes of each, or 40 if it had 32 bits: 3 to 7 GiB of the largest image that is read."""
    turn = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + bytes(4)
    files = {
        "grey.png": zeros(16, 0, 1),
        "transparent.png": zeros(8, 6, 4),
        "colour.png": zeros(1, 0, 1, (b"tRNS", b"\0\0")),
        "turned.png": zeros(8, 6, 4, (b"eXIf", turn)),
    }
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "small.png")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < SIDE * SIDE // 200
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("small.png", *files))]
    taken = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert taken < 11.5 * SIDE * SIDE  # one for the rows that are resized


@pytest.mark.parametrize("form", HEAVY)
def test_decoders_that_need_more_memory_get_fewer_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (40, 40)).save(buffer, form)
    assert image_size(ImageRef(data=buffer.getvalue())) == (40, 40)
    monkeypatch.setitem(HEAVY, form, 1599)
    with pytest.raises(TooLargeError, match=f"40 x 40 pixels, at most 1599 of a {form} are read"):
        load_image(ImageRef(data=buffer.getvalue()))


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat"])
def test_a_playlist_shows_no_video_from_elsewhere(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "private.mp4")
    playlists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nfile://{tmp_path}/private.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat": f"ffconcat version 1.0\nfile {tmp_path}/private.mp4\n",
    }
    assert read_timeline(str(tmp_path / "private.mp4")).width == 64
    for number, text in enumerate(playlists.values()):
        path = tmp_path / f"{number}-{name}"
        path.write_text(text)
        with pytest.raises((MediaError, av.error.FFmpegError)):
            read_timeline(str(path))


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
