"""Images and videos that mean harm: no other program is started, and no file is opened that they name."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path

import av
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from shards.convert.masks import _mask
from shards.download.connect import FetchError
from shards.download.urls import check_image
from shards.media.images import FORMATS, image_size, load_image
from shards.media.timeline import read_timeline
from shards.media.types import MediaError
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
