"""Segmentation masks for metrics: reading them from image files, and encoding them as run lengths.

The run lengths are COCO's uncompressed RLE: {"size": [height, width], "counts": [...]}, column-major, zeros first.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.catalog import Masks
from shards.media.images import open_image
from shards.schema import RejectedError
from shards.sources.paths import at, is_system_file


def run_lengths(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask [height, width] as run lengths."""
    flat = mask.astype(bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[:1].any() else counts}


def packed(value: Any) -> Any:
    """Replace every mask in a fact (a nested list [height, width]) by its run lengths; other values are unchanged."""
    if not isinstance(value, list) or not value:
        return value
    if isinstance(value[0], list) and value[0] and isinstance(value[0][0], bool | int):
        try:
            return run_lengths(np.array(value, bool))
        except ValueError:
            raise RejectedError(f"a mask whose {len(value)} rows are not of equal length") from None
    return [packed(item) for item in value]


def masks_of(masks: Masks, root: Path, row: Mapping[str, Any]) -> list[Any]:
    """Read the masks of a row: one per object, or a list of them per object if they are frames of a video.

    Raises:
        RejectedError: a file is missing, outside of `root`, or unreadable.
    """
    ids = [None] if masks.objects is None else at(row, masks.objects)
    ids = ids if isinstance(ids, list) else [ids]
    own_files = "{object}" in masks.files
    result = []
    for object_id in ids:
        value = None if own_files or object_id is None else int(object_id)
        files = _files(masks, root, {**row, "object": object_id})
        frames = [_mask(file, value, masks.above) for file in files]
        result.append(frames if "*" in Path(masks.files).name else frames[0])
    return result


def _files(masks: Masks, root: Path, values: Mapping[str, Any]) -> list[Path]:
    escaped = {name: glob.escape(str(value)) for name, value in values.items()}
    try:
        pattern = masks.files.format(**escaped)
        matches = (path for path in root.glob(pattern) if not is_system_file(path.relative_to(root)))
        files = sorted(path.resolve() for path in matches)
    except (KeyError, IndexError, ValueError, NotImplementedError) as error:
        raise RejectedError(f"media: masks {masks.files}: {error!r}") from None
    if not files:
        raise RejectedError(f"media: {root / pattern}: no mask")
    if len(folders := sorted({path.parent.name for path in files})) > 1:
        raise RejectedError(f"media: {root / pattern}: masks in several folders: {', '.join(folders[:3])}")
    if outside := [path for path in files if not path.is_relative_to(root.resolve())]:
        raise RejectedError(f"media: {outside[0]} lies outside of {root}")
    return files


def _mask(path: Path, value: int | None, above: int) -> dict[str, Any]:
    try:
        with open_image(path) as opened:
            values = opened.mode in {"1", "L", "P"} or opened.mode.startswith("I")  # "I": objects beyond number 255
            pixels = np.asarray(opened if values else opened.convert("L"))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything
        raise RejectedError(f"media: {path}: not a readable mask ({error})") from None
    return run_lengths(pixels > above if value is None else pixels == value)
