"""Decoding of still images (`shards.media.jpeg` has the JPEGs of shards). The processor decides their sizes.

Whatever a file holds, its pixels become RGB with 8 bits:

- the EXIF orientation is applied; damaged EXIF counts as none;
- transparent pixels are laid on white, as a page shows them;
- integers of 16 bits are divided by 257, so that 65535 becomes 255;
- integers of 32 bits and floats are kept if all are within 0 - 255. Floats within 0 - 1 are multiplied by 255; any
  other range is stretched, its smallest value to 0 and its largest to 255. NaN and infinite values become 0.

`image_size` and `load_image` open a file in the same way, with the same limits and orientation. An image is converted
in parts, so that a small file of many pixels needs no more memory than its decoder and the result: see `MAX_PIXELS`.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image
import xxhash

from shards.media.types import MediaError, Pixels, TooLargeError
from shards.schema import ImageRef, PictureNotes

# The formats that are read. Others that Pillow knows run programs (EPS starts Ghostscript) or have rarely been tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "DDS")
MAX_PIXELS = 2 * 89_478_485  # largest image that is decoded; Pillow itself refuses more
# Other limits: these decoders take 16 and 25 bytes of memory for a pixel, where others take up to 10 with the result.
HEAVY = {"WEBP": MAX_PIXELS // 2, "JPEG2000": MAX_PIXELS // 3}
PART_PIXELS = 1 << 20  # pixels that are converted at a time
ORIENTATION = 0x0112  # EXIF tag
TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}  # EXIF orientation -> the operation that makes the image upright
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}  # chunks of text and colour profiles, whose size Pillow limits
SAMPLE_BITS = {"1": 1, "L;2": 2, "L;4": 4, "RGB;16B": 16}  # raw mode of a PNG -> bits of a sample, if not 8

TINY_SIDE = 32  # pixels; an image with a shorter side is noted as tiny
# what is noted about an image for the report of a build
TRANSPARENT = "pictures with transparent parts, laid on white"
FLAT = "pictures of one colour"
TINY = f"pictures with a side below {TINY_SIDE} pixels"
DEEP = "pictures with more than 8 bits, scaled"
TURNED = "pictures turned by their EXIF orientation"

Result = TypeVar("Result")


class GreyScale(NamedTuple):
    """How the values of grey with more than 8 bits become levels: `(value - least) / span * top`."""

    least: float = 0.0
    span: float = 1.0
    top: float = 1.0


def load_image(ref: ImageRef) -> Pixels:
    """Decode an image as upright RGB uint8 [H, W, 3]; see the module for orientation, transparency and bit depths.

    Raises:
        MediaError: the file is missing, too large, or not an image.
    """
    return _with_image(ref, rgb_pixels)


def load_with_notes(ref: ImageRef) -> tuple[Pixels, PictureNotes]:
    """As `load_image`, with what is peculiar about the image.

    Raises:
        MediaError: as by `load_image`.
    """
    return _with_image(ref, _noted_pixels)


def _noted_pixels(image: PIL.Image.Image) -> tuple[Pixels, PictureNotes]:
    turned, high = _orientation(image) in TURNS, image.mode.startswith(("I", "F"))  # before `load`, which turns a TIFF
    deep = high or SAMPLE_BITS.get(_raw_mode(image), 8) > 8
    pixels = rgb_pixels(image)
    transparent = image.has_transparency_data
    if transparent and not high:
        transparent = any(np.asarray(part.convert("RGBA"))[..., 3].min() < 255 for _, part in _parts(image))
    height, width = pixels.shape[:2]
    flat = bool((pixels[0] == pixels[0, 0]).all() and (pixels.min((0, 1)) == pixels.max((0, 1))).all())
    found = {TRANSPARENT: transparent, FLAT: flat, TINY: min(height, width) < TINY_SIDE, DEEP: deep, TURNED: turned}
    digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data, seed=width)
    return pixels, PictureNotes(kinds=tuple(kind for kind, present in found.items() if present), pixels=digest)


def image_size(ref: ImageRef) -> tuple[int, int]:
    """Width and height of the image that `load_image` returns, from the header.

    Raises:
        MediaError: the file is missing or not an image; a `TooLargeError` if it has too many pixels.
    """
    return _with_image(ref, _upright_size)


def rgb_pixels(image: PIL.Image.Image) -> Pixels:
    """The pixels of an opened image as `load_image` returns them."""
    raw_mode = _raw_mode(image)
    image.load()
    turn = TURNS.get(_orientation(image))  # after `load`, which turns a TIFF
    if image.mode.startswith(("I", "F")):
        convert = functools.partial(_high_depth, scale=_grey_scale(image))
    else:
        convert = functools.partial(_eight_bits, bits=SAMPLE_BITS.get(raw_mode, 8))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for place, part in _parts(image):
        pixels[place] = convert(part)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _parts(image: PIL.Image.Image) -> Iterator[tuple[tuple[slice, slice], PIL.Image.Image]]:
    """Yield an image in parts of at most `PART_PIXELS`, each with its rows and columns; a small one is one part."""
    width, height = min(image.width, PART_PIXELS), max(1, PART_PIXELS // image.width)
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            right, bottom = min(left + width, image.width), min(top + height, image.height)
            whole = (right - left, bottom - top) == image.size
            yield (slice(top, bottom), slice(left, right)), image if whole else image.crop((left, top, right, bottom))


def _raw_mode(image: PIL.Image.Image) -> str:
    """How the file holds its samples, such as "RGB;16B"; to be read before `load`, which clears it."""
    tiles: list[Any] = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else None
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _with_image(ref: ImageRef, use: Callable[[PIL.Image.Image], Result]) -> Result:
    """Open an image, check its size and apply `use`; every error becomes a `MediaError`."""
    where = ref.path if ref.path is not None else "embedded image"
    try:
        try:
            return _opened(where, ref.path if ref.path is not None else io.BytesIO(ref.data or b""), use)
        except ValueError as error:  # Pillow refuses a PNG with more than 1 MB of text in a chunk
            data = b"" if isinstance(error, MediaError) else _png_data(ref)
            if not data:
                raise
            return _opened(where, io.BytesIO(_without_texts(data)), use)
    except FileNotFoundError:
        raise MediaError(f"{where}: no such image") from None
    except (MediaError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:  # Pillow's own limit, close below ours
        raise TooLargeError(f"{where}: {error}") from None
    except Exception as error:
        if ref.path is not None and Path(ref.path).stat().st_size == 0:
            raise MediaError(f"{where}: not a readable image (the file is empty)") from None
        # decoders raise struct.error, SyntaxError, NotImplementedError, TypeError and more
        raise MediaError(f"{where}: not a readable image ({type(error).__name__}: {error})") from None


def open_image(source: str | Path | IO[bytes]) -> PIL.Image.Image:
    """Open an image of one of `FORMATS`, which its bytes tell and not its name; every image of others is opened here.

    Raises:
        MediaError: it has too many pixels (`TooLargeError`); Pillow raises exceptions of any other type.
    """
    image = PIL.Image.open(source, formats=FORMATS)
    most = HEAVY.get(image.format or "", MAX_PIXELS)
    if image.width * image.height > most:
        image.close()
        raise TooLargeError(f"{image.width} x {image.height} pixels, at most {most} of a {image.format} are read")
    return image


def _opened(where: str, source: str | io.BytesIO, use: Callable[[PIL.Image.Image], Result]) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF counts as none, and large images have their own limit
        try:
            with open_image(source) as image:
                return use(image)
        except TooLargeError as error:
            raise TooLargeError(f"{where}: {error}") from None


def _png_data(ref: ImageRef) -> bytes:
    """The bytes of an image if it is a PNG, else b""."""
    data = Path(ref.path).read_bytes() if ref.path is not None else ref.data or b""
    return data if data.startswith(PNG_SIGNATURE) else b""


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile; the pixels are the same."""
    return PNG_SIGNATURE + b"".join(chunk for kind, chunk in _png_chunks(data) if kind not in PNG_TEXTS)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind of each chunk, and the whole chunk with its length and checksum."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 - 8; 1 if there is none or the EXIF is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return int(value[0] if isinstance(value, tuple) else value)
    except Exception:  # any damage: the photo itself may be whole
        return 1


def _upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.format != "TIFF" and _orientation(image) in {5, 6, 7, 8}  # Pillow turns the size of a TIFF itself
    return (height, width) if turned else (width, height)


def _eight_bits(image: PIL.Image.Image, bits: int) -> Pixels:
    """RGB of an image whose samples Pillow gives with 8 bits; the file has `bits` for each."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    level = image.info.get("transparency")
    if image.mode in {"1", "L", "RGB"}:  # one colour of an opaque image is transparent
        levels = level if isinstance(level, tuple) else (level,) * 3
        colour = np.array([_to_eight(int(v), bits) for v in levels])
        pixels = np.array(image.convert("RGB"))
        pixels[(pixels == colour).all(-1)] = 255
        return pixels
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGBA", rgba.size, "white")
    return np.asarray(PIL.Image.alpha_composite(white, rgba).convert("RGB"))


def _to_eight(level: int, bits: int) -> int:
    return level >> 8 if bits == 16 else level * 255 // ((1 << bits) - 1)


def _grey_scale(image: PIL.Image.Image) -> GreyScale:
    """The scale of grey with 16 or 32 bits; see the module."""
    if image.mode.startswith("I;16") or image.format == "PPM":  # Pillow scales a PGM of any depth to 16 bits
        return GreyScale(span=257)
    least, most = np.inf, -np.inf
    for _, part in _parts(image):
        values: npt.NDArray[Any] = np.asarray(part)
        finite = values[np.isfinite(values)].astype(np.float64)
        least, most = finite.min(initial=least), finite.max(initial=most)
    if image.mode == "F" and 0 <= least and most <= 1:
        return GreyScale(top=255)
    if (0 <= least and most <= 255) or least >= most:
        return GreyScale()
    return GreyScale(least=float(least), span=float(most - least), top=255)


def _high_depth(image: PIL.Image.Image, scale: GreyScale) -> Pixels:
    """RGB of a grey image with 16 or 32 bits, or of floats."""
    values: npt.NDArray[Any] = np.asarray(image)
    with np.errstate(invalid="ignore"):  # infinite values
        grey = np.rint((values.astype(np.float64) - scale.least) / scale.span * scale.top)
    grey = np.where(np.isfinite(values), grey, 0)
    level = image.info.get("transparency")
    if isinstance(level, int):
        grey = np.where(values == level, 255.0, grey)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
