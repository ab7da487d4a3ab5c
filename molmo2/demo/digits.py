"""Real handwritten digits: the split into train and held-out, and pictures composed of them.

The digits are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, 17 grey levels). This file draws and places
them; the questions about a picture are in `image_sets` and `video_sets`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Generator = np.random.Generator

COLUMNS, ROWS = ("left", "center", "right"), ("top", "middle", "bottom")


@dataclass(frozen=True, slots=True)
class Pool:
    """The digits of one split: `number` [N] (index in load_digits), `label` [N] 0-9, `scan` uint8 [N, 8, 8]."""

    number: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    scan: Pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedDigit:
    """One digit on a picture: a square of `size` pixels whose top left corner is at (x, y)."""

    number: int
    label: int
    scan: Pixels
    x: float
    y: float
    size: int

    @property
    def center(self) -> tuple[float, float]:
        """Center in pixels, (x, y)."""
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in pixels."""
        return self.x, self.y, self.x + self.size, self.y + self.size


def generator(*key: object) -> Generator:
    """A random generator that depends only on `key`, so that any part of the data can be made separately."""
    seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))


def held_out(number: int) -> bool:
    """Whether a digit belongs to the held-out fifth; this depends only on its index."""
    return hashlib.sha256(f"digit-{number}".encode()).digest()[0] % 5 == 0


def load_pool(split: str) -> Pool:
    """Load the digits of "train" or "validation" (held out) from scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    number = np.array([i for i in range(len(data.target)) if held_out(i) == (split == "validation")])
    scan = np.round(data.images[number] * (255 / 16)).astype(np.uint8)
    return Pool(number, data.target[number].astype(np.int64), scan)


def pick(rng: Generator, pool: Pool, labels: list[int] | None = None) -> tuple[int, int, Pixels]:
    """A random digit: index in load_digits, label, scan. `labels`: the classes to draw from, with equal probability."""
    if labels is None:
        labels = list(range(10))
    candidates = np.flatnonzero(pool.label == labels[rng.integers(len(labels))])
    i = int(candidates[rng.integers(len(candidates))])
    return int(pool.number[i]), int(pool.label[i]), pool.scan[i]


def enlarge(scan: Pixels, size: int) -> npt.NDArray[np.float32]:
    """A scan enlarged to `size` x `size`, float32 from 0 (paper) to 1 (ink)."""
    ink = np.asarray(Image.fromarray(scan).resize((size, size), Image.Resampling.BILINEAR), np.float32)
    return ink / np.float32(255)


def draw(shape: tuple[int, int], placed: list[PlacedDigit], paper: int, ink: int) -> Pixels:
    """Draw bright digits on dark paper at whole pixels: uint8 [height, width, 3] for `shape` = (height, width)."""
    gray = np.full(shape, paper, np.float32)
    for digit in placed:
        x, y = round(digit.x), round(digit.y)
        patch = gray[y : y + digit.size, x : x + digit.size]
        shade = enlarge(digit.scan, digit.size)
        patch += (ink - patch) * shade
    return np.repeat(np.round(gray).astype(np.uint8)[..., None], 3, axis=2)


def scatter(
    rng: Generator, pool: Pool, shape: tuple[int, int], cell: int, labels: list[list[int]]
) -> list[PlacedDigit]:
    """Place digits in different cells of a grid over a picture of `shape` = (height, width), one per entry of `labels`.

    A digit is centred in its cell and fills it up to 0 or 2 pixels. Digits of one column share one x, so that the order
    of points, by x and then y, is visible in the picture.
    """
    rows, cols = shape[0] // cell, shape[1] // cell
    placed = []
    for spot, allowed in zip(rng.permutation(rows * cols), labels, strict=False):
        number, label, scan = pick(rng, pool, allowed)
        margin = int(rng.integers(2))
        size = cell - 2 * margin
        x, y = int(spot % cols) * cell + margin, int(spot // cols) * cell + margin
        placed.append(PlacedDigit(number=number, label=label, scan=scan, x=x, y=y, size=size))
    return sorted(placed, key=lambda digit: (digit.y // cell, digit.x))


def place_word(x: float, y: float) -> str:
    """The location of a point in words: "top left", "center", "right"; x and y are fractions of width and height."""
    column, row = COLUMNS[min(2, int(x * 3))], ROWS[min(2, int(y * 3))]
    if row == "middle":
        return column
    return row if column == "center" else f"{row} {column}"


def png(picture: Pixels) -> bytes:
    """PNG bytes of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def jpeg(picture: Pixels) -> bytes:
    """JPEG bytes of a picture, quality 95, no chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
