"""The JPEGs of shards, which the builder writes and the loader decodes: RGB, no colour subsampling."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image


def encode_jpeg(pixels: npt.NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode RGB uint8 [H, W, 3] as a JPEG without chroma subsampling (4:4:4), by Pillow, with the accurate DCT.

    simplejpeg encodes with the fast DCT up to quality 95, whatever it is asked for, which costs 0.6 dB.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width of a JPEG, from its header; raises as `decode_jpeg`."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return height, width


def decode_jpeg(data: bytes | memoryview, into: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Decode a JPEG as RGB uint8 [H, W, 3] with the accurate DCT, which gives the same pixels as Pillow.

    `into`: contiguous memory of just this size for the pixels.

    Raises:
        ValueError: the data are not a JPEG.
    """
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=into)
    return pixels
