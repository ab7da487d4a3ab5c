"""Decoding and encoding of still images. The processor decides the sizes that a model needs."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

from shards.media.types import MediaError, Pixels
from shards.schema import ImageRef

MAX_PIXELS = 200_000_000  # largest image that is decoded


def load_image(ref: ImageRef) -> Pixels:
    """Decode an image as RGB uint8 [H, W, 3], with its EXIF orientation applied.

    Raises:
        MediaError: the file is missing, too large, or not an image.
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
    except MediaError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, PIL.Image.DecompressionBombError) as error:
        raise MediaError(f"{where}: not a readable image ({error})") from None


def encode_jpeg(pixels: Pixels, quality: int = 95) -> bytes:
    """Encode RGB uint8 [H, W, 3] as a JPEG without chroma subsampling (4:4:4)."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444", fastdct=False)
    return data


def decode_jpeg(data: bytes | memoryview) -> Pixels:
    """Decode a JPEG as RGB uint8 [H, W, 3] with the accurate DCT, which gives the same pixels as Pillow.

    Raises:
        ValueError: the data are not a JPEG.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return pixels
