"""Images in all the forms that files have: bit depths, transparency, orientation, size limits, damaged EXIF."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from shards.media.images import image_size, load_image
from shards.media.types import MediaError, TooLargeError
from shards.schema import ImageRef


def loaded(image: PIL.Image.Image, form: str = "PNG", **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return load_image(ImageRef(data=buffer.getvalue()))


def grey_png(bits: int, rows: list[bytes], width: int, transparent: int | None = None, colour: int = 0) -> ImageRef:
    """A PNG of uncompressed rows, which may name a transparent grey level."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0))
    levels = 3 if colour else 1
    trns = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent) * levels)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return ImageRef(data=b"\x89PNG\r\n\x1a\n" + head + trns + body + chunk(b"IEND", b""))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(form: str) -> None:
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    assert loaded(PIL.Image.fromarray(values), form)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_big_endian_and_pgm_of_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], ">u2")
    image = PIL.Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert loaded(image, "TIFF")[0, :, 1].tolist() == [0, 1, 255]
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + values.tobytes())
    assert load_image(ImageRef(path=str(tmp_path / "x.pgm")))[0, :, 2].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("kind", "values", "grey"),
    [
        (np.int32, [0, 128, 255], [0, 128, 255]),
        (np.int32, [0, 500, 1000], [0, 128, 255]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [0.0, 100.4, 255.0], [0, 100, 255]),
        (np.float32, [1000.0, 2000.0, 3000.0], [0, 128, 255]),
        (np.float32, [np.nan, 2000.0, 3000.0], [0, 0, 255]),
        (np.float32, [7000.0, 7000.0, 7000.0], [255, 255, 255]),
    ],
)
def test_wide_values_are_scaled_by_their_range(kind: type, values: list[float], grey: list[int]) -> None:
    assert loaded(PIL.Image.fromarray(np.array([values], kind)), "TIFF")[0, :, 0].tolist() == grey


def test_transparent_pixels_are_laid_on_white() -> None:
    rgba = PIL.Image.new("RGBA", (3, 1))
    for x, colour in enumerate([(0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 128)]):
        rgba.putpixel((x, 0), colour)
    assert loaded(rgba)[0].tolist() == [[0, 0, 0], [255, 255, 255], [255, 127, 127]]
    assert loaded(rgba, "WEBP", lossless=True)[0].tolist() == [[0, 0, 0], [255, 255, 255], [255, 127, 127]]
    grey = PIL.Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((0, 0), (40, 255))
    assert loaded(grey)[0, :, 0].tolist() == [40, 255]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 10, 10])
    palette.putpixel((1, 0), 1)
    assert loaded(palette, transparency=0)[0].tolist() == [[255, 255, 255], [200, 10, 10]]
    assert loaded(palette, "GIF", transparency=0)[0].tolist() == [[255, 255, 255], [200, 10, 10]]
    assert loaded(palette)[0].tolist() == [[0, 0, 0], [200, 10, 10]]


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "grey"),
    [
        (1, b"\x50", 0, [255, 255, 255, 255]),  # levels 0 1 0 1
        (1, b"\x50", 1, [0, 255, 0, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),  # levels 0 1 2 3
        (4, b"\x12\x0f", 2, [17, 255, 0, 255]),
        (8, bytes([0, 7, 8, 255]), 7, [0, 255, 8, 255]),
        (16, struct.pack(">4H", 0, 1799, 1800, 65535), 1799, [0, 255, 7, 255]),
    ],
)
def test_a_transparent_grey_level_is_white(bits: int, row: bytes, transparent: int, grey: list[int]) -> None:
    assert load_image(grey_png(bits, [row], 4, transparent))[0, :, 0].tolist() == grey


@pytest.mark.parametrize(("bits", "level"), [(8, 9), (16, 9 * 257)])
def test_a_transparent_colour_is_white(bits: int, level: int) -> None:
    samples = [level, level, level, 0, 0, level]
    row = struct.pack(f">6{'B' if bits == 8 else 'H'}", *samples)
    assert load_image(grey_png(bits, [row], 2, level, colour=2))[0].tolist() == [[255, 255, 255], [0, 0, 9]]


def test_one_bit_palette_and_cmyk() -> None:
    bits = PIL.Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert loaded(bits)[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    red = PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for options in ({"quality": 100}, {"quality": 100, "subsampling": 0}):  # Pillow writes Adobe's inverted values
        assert np.abs(loaded(red, "JPEG", **options)[4, 4].astype(int) - [255, 0, 0]).max() <= 2
    assert loaded(red, "TIFF")[4, 4].tolist() == [255, 0, 0]


CORNERS = {  # orientation -> where the stored upper left pixel is shown, of an image shown 2 x 3
    1: (0, 0),
    2: (0, 1),
    3: (2, 1),
    4: (2, 0),
    5: (0, 0),
    6: (0, 1),
    7: (2, 1),
    8: (2, 0),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_orientation_is_applied_to_pixels_and_size(form: str, orientation: int) -> None:
    stored = PIL.Image.new("RGB", (2, 3) if orientation < 5 else (3, 2))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    ref = ImageRef(data=buffer.getvalue())
    pixels = load_image(ref)
    assert pixels.shape == (3, 2, 3) and image_size(ref) == (2, 3)
    assert np.argwhere(pixels[..., 0] == 255).tolist() == [list(CORNERS[orientation])]


def jpeg_with_exif(body: bytes, size: tuple[int, int] = (60, 40)) -> ImageRef:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, "red").save(buffer, "JPEG")
    plain, exif = buffer.getvalue(), b"Exif\0\0" + body
    return ImageRef(data=plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:])


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


TURNED = entry(0x0112, 3, 1, struct.pack("<H", 6))


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + TURNED + bytes(4), (40, 60)),
        # the latitude is a text, not three fractions
        (
            b"II*\0\x08\0\0\0"
            + struct.pack("<H", 2)
            + TURNED
            + entry(0x8825, 4, 1, struct.pack("<I", 38))
            + bytes(4)
            + struct.pack("<H", 1)
            + entry(2, 2, 9, struct.pack("<I", 56))
            + bytes(4)
            + b"48,08,00\0",
            (40, 60),
        ),
        (b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + TURNED, (40, 60)),  # cut off after the first of nine entries
        (b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry(0x0112, 2, 2, b"6\0") + bytes(4), (40, 60)),  # a text
        (b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry(0x0112, 3, 1, b"\x63\0") + bytes(4), (60, 40)),  # 99
        (b"no tiff header", (60, 40)),
        (b"", (60, 40)),
    ],
)
def test_damaged_exif_costs_no_photo(body: bytes, size: tuple[int, int]) -> None:
    ref = jpeg_with_exif(body)
    assert load_image(ref).shape == (size[1], size[0], 3) and image_size(ref) == size


def test_texts_and_profiles_of_a_png_have_no_limit(tmp_path: Path) -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("workflow", "{}" * 1_000_000, zip=True)
    image = PIL.Image.new("RGB", (6, 4), "red")
    image.save(tmp_path / "text.png", pnginfo=info)
    image.save(tmp_path / "icc.png", icc_profile=bytes(2_000_000))
    for name in ("text.png", "icc.png"):
        ref = ImageRef(path=str(tmp_path / name))
        assert load_image(ref)[0, 0].tolist() == [255, 0, 0] and image_size(ref) == (6, 4)
    late = (tmp_path / "text.png").read_bytes()
    start = late.index(b"zTXt") - 4
    end = start + 12 + int.from_bytes(late[start : start + 4])
    after = late[:start] + late[end:-12] + late[start:end] + late[-12:]  # the text stands after the pixels
    assert load_image(ImageRef(data=after))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("read", [load_image, image_size])
def test_size_and_pixels_have_the_same_limits(tmp_path: Path, read) -> None:
    for side in (13_400, 15_000):  # above Pillow's limit, above ours
        buffer = io.BytesIO()
        PIL.Image.new("1", (side, side)).save(buffer, "PNG")
        with pytest.raises(TooLargeError, match="pixels"):
            read(ImageRef(data=buffer.getvalue()))
    with pytest.raises(MediaError, match=r"x\.png: no such image"):
        read(ImageRef(path=str(tmp_path / "x.png")))
    with pytest.raises(MediaError, match="not a readable image"):
        read(ImageRef(data=b"GIF89a"))


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError, KeyError, struct.error, SyntaxError])
def test_any_error_of_a_decoder_is_one_of_the_image(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error("odd file")

    monkeypatch.setattr(PIL.Image, "open", broken)
    with pytest.raises(MediaError, match=f"embedded image: not a readable image .{error.__name__}: .*odd file"):
        load_image(ImageRef(data=b"x"))
