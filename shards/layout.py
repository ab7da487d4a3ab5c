"""Visual layout: from a stored image or frame to its tokens, its crops and its pooling indices.

The builder counts lengths with these functions and the loader expands with the same ones, so that the lengths of a
shard always agree. The processor chooses the tiling of an image (`molmo2/processing`).

A *visual* is one image or one video frame, as the JSON record of a sample lists it:
    {"kind": "image", "view": 0, "canvas": 1, "tiling": [rows, cols]}    view, canvas: numbers of JPEG members
    {"kind": "frame", "view": 3, "time": 1.5}                           seconds
A *crop* is one square ViT input. Sizes are in pixels where the name does not say patches.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """Ids of the tokens that carry or delimit visuals. `image` and `video` are placeholders that a model never sees."""

    im_start: int
    im_end: int
    im_patch: int
    im_col: int
    low_res_im_start: int
    image: int
    im_low: int
    frame_start: int
    frame_end: int
    video: int

    @classmethod
    def after(cls, base_vocab: int) -> VisualTokens:
        """Ids in Molmo2's order of added tokens, the first one being `base_vocab`."""
        names = ("im_start", "im_end", "im_patch", "im_col", "low_res_im_start", "image", "im_low", "frame_start")
        return cls(**{name: base_vocab + i for i, name in enumerate((*names, "frame_end", "video"))})

    @property
    def bidirectional(self) -> tuple[int, ...]:
        """The eight token ids that attend to each other in both directions (Molmo2's "image_tokens" mask)."""
        return (
            self.im_patch,
            self.im_col,
            self.im_start,
            self.low_res_im_start,
            self.im_end,
            self.frame_start,
            self.frame_end,
            self.im_low,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualLayout:
    """Geometry of a model's vision input; Molmo2: crop 378, patch 14, margin 4 patches, pools 2 and 3."""

    tokens: VisualTokens
    crop_size: int
    patch_size: int
    overlap_margin: int  # patches that neighbouring crops share with the canvas border, per side
    image_pool: int
    video_pool: int

    @property
    def crop_patches(self) -> int:
        """Patches per side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches per side that a crop adds to the canvas: its own patches minus both margins."""
        return self.crop_patches - 2 * self.overlap_margin

    def to_json(self) -> dict[str, Any]:
        """The layout as a JSON value; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> VisualLayout:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError, KeyError: a field is missing, unknown, or no number that a model could have.
        """
        layout = cls(**{**value, "tokens": VisualTokens(**value["tokens"])})
        numbers = [*value["tokens"].values(), *(size for name, size in value.items() if name != "tokens")]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers) or layout.crop_size > 4096:
            raise ValueError(f"layout: not numbers, or a crop of more than 4096 pixels: {value}")
        if not layout.patch_size or min(layout.image_pool, layout.video_pool, layout.window_patches) < 1:
            raise ValueError(f"layout: crops without patches of their own: {value}")
        return layout

    def canvas_size(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the canvas that `tiling` = (rows, cols) of crops cover."""
        margin = 2 * self.overlap_margin * self.patch_size
        return tuple(n * self.window_patches * self.patch_size + margin for n in tiling)  # type: ignore[return-value]


def _canvas_patches(layout: VisualLayout, tiling: tuple[int, int]) -> IntArray:
    """Index of every canvas patch in the flat patch axis of an image (crop 0 is the view), [rows, cols].

    Crops overlap: a canvas patch is taken from the crop that has it inside its margins, or else from the border crop.
    """
    side, window, margin = layout.crop_patches, layout.window_patches, layout.overlap_margin

    def owners(count: int) -> tuple[IntArray, IntArray]:
        position = np.arange(count * window + 2 * margin)
        owner = np.clip((position - margin) // window, 0, count - 1)
        return owner, position - owner * window

    row_crop, row = owners(tiling[0])
    col_crop, col = owners(tiling[1])
    crop = 1 + row_crop[:, None] * tiling[1] + col_crop[None, :]
    return crop * side * side + row[:, None] * side + col[None, :]


def _pool(grid: IntArray, pool: int) -> IntArray:
    """Windows of a grid of patch indices, [ceil(rows / pool), ceil(cols / pool), pool * pool]; -1 pads the borders."""
    pads = [(-n % pool // 2, -n % pool - -n % pool // 2) for n in grid.shape]
    grid = np.pad(grid, pads, constant_values=-1)
    rows, cols = grid.shape[0] // pool, grid.shape[1] // pool
    return grid.reshape(rows, pool, cols, pool).swapaxes(1, 2).reshape(rows, cols, pool * pool)


@functools.lru_cache(maxsize=4096)
def _image(layout: VisualLayout, tiling: tuple[int, int]) -> tuple[npt.NDArray[np.int32], IntArray]:
    side, tokens = layout.crop_patches, layout.tokens
    low = _pool(np.arange(side * side).reshape(side, side), layout.image_pool)
    high = _pool(_canvas_patches(layout, tiling), layout.image_pool)
    row = [tokens.im_patch] * high.shape[1] + [tokens.im_col]
    ids = [tokens.low_res_im_start] + [tokens.im_patch] * (low.shape[0] * low.shape[1]) + [tokens.im_end]
    ids += [tokens.im_start] + row * high.shape[0] + [tokens.im_end]
    pooling = np.concatenate([low.reshape(-1, low.shape[-1]), high.reshape(-1, high.shape[-1])])
    return np.array(ids, np.int32), pooling


@functools.lru_cache(maxsize=16)
def _frame(layout: VisualLayout) -> tuple[npt.NDArray[np.int32], IntArray]:
    side, tokens = layout.crop_patches, layout.tokens
    pooling = _pool(np.arange(side * side).reshape(side, side), layout.video_pool)
    pooling = pooling.reshape(-1, pooling.shape[-1])
    ids = [tokens.frame_start] + [tokens.im_patch] * len(pooling) + [tokens.frame_end]
    return np.array(ids, np.int32), pooling


def visual_tokens(layout: VisualLayout, visual: dict[str, Any]) -> npt.NDArray[np.int32]:
    """Token ids that replace a visual's placeholder, [tokens]."""
    return (_frame(layout) if visual["kind"] == "frame" else _image(layout, tuple(visual["tiling"])))[0]


def visual_pooling(layout: VisualLayout, visual: dict[str, Any]) -> IntArray:
    """Patch indices that each visual token pools, [im_patch tokens, pool ** 2], within the visual's crops; -1 pads."""
    return (_frame(layout) if visual["kind"] == "frame" else _image(layout, tuple(visual["tiling"])))[1]


def visual_crops(visual: dict[str, Any]) -> int:
    """Number of ViT inputs of a visual: 1 for a frame, 1 + rows * cols for an image.

    Raises:
        ValueError: the kind is another one, or rows and cols are not two positive integers.
    """
    if visual["kind"] == "frame":
        return 1
    if visual["kind"] != "image":
        raise ValueError(f"a visual of kind {visual['kind']!r}")
    rows, cols = visual["tiling"]
    if not (type(rows) is type(cols) is int and rows > 0 and cols > 0):
        raise ValueError(f"a tiling of {rows!r} x {cols!r} crops")
    return 1 + rows * cols


def split_crops(
    layout: VisualLayout,
    tiling: tuple[int, int],
    view: npt.NDArray[np.uint8],
    canvas: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The view, then the overlapping crops of the canvas in raster order, [1 + rows * cols, crop, crop, 3]."""
    size, stride = layout.crop_size, layout.window_patches * layout.patch_size
    tops = [row * stride for row in range(tiling[0])]
    lefts = [col * stride for col in range(tiling[1])]
    crops = [canvas[top : top + size, left : left + size] for top in tops for left in lefts]
    return np.stack([view, *crops], out=out)


def sample_visuals(record: dict[str, Any], variant: int) -> list[dict[str, Any]]:
    """The visuals of one text variant, in the order of its placeholders; all visuals if the variant lists none."""
    chosen = record["variants"][variant % len(record["variants"])].get("visuals")  # one entry if all are equal
    visuals: list[dict[str, Any]] = record["visuals"]
    return visuals if chosen is None else [visuals[i] for i in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expanded:
    """Model inputs of one sample: every array [tokens]. `labels` are already shifted within each branch."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    branch: npt.NDArray[np.int16]
    position_ids: npt.NDArray[np.int32]
    is_visual: npt.NDArray[np.bool_]


def expand(layout: VisualLayout, stored: npt.NDArray[np.void], visuals: list[dict[str, Any]]) -> Expanded:
    """Expand the placeholders of a stored variant and shift its labels.

    The last token of every branch (EOS) is a label only. Positions of each branch continue from the end of the trunk.

    Raises:
        ValueError: a token is neither of the text's vocabulary nor a placeholder, the numbers of placeholders and of
            visuals differ, or branches are out of order.
    """
    ids, branch = np.ascontiguousarray(stored["id"]), stored["branch"].astype(np.int64)
    # Ids of visuals lie above the vocabulary; as unsigned numbers, negative ones lie above both.
    holders = np.flatnonzero(ids.view(np.uint32) >= layout.tokens.im_start)
    for number in ids[holders].tolist():
        if number not in (layout.tokens.image, layout.tokens.video):
            raise ValueError(f"token {number} is neither text (below {layout.tokens.im_start}) nor a placeholder")
    if len(holders) != len(visuals):
        raise ValueError(f"{len(holders)} visual placeholders for {len(visuals)} visuals")
    steps = branch[1:] - branch[:-1]
    if len(ids) == 0 or branch[0] != 0 or ((steps != 0) & (steps != 1)).any():
        raise ValueError("branches must start at 0 and rise by 1")
    ends = np.append(np.flatnonzero(steps), len(ids) - 1)  # the last token of the trunk and of every branch
    labels, weights = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.float32)
    labels[:-1], weights[:-1] = ids[1:], stored["weight"][1:]
    labels[ends], weights[ends] = 0, 0  # no token predicts the first token of the next branch
    pieces = [visual_tokens(layout, visual) for visual in visuals]
    counts = np.ones(len(ids), np.int64)
    counts[holders] = [len(piece) for piece in pieces]
    counts[ends[branch[ends] > 0]] = 0  # the EOS of each branch is not an input
    out_ids, out_branch = np.repeat(ids, counts), np.repeat(branch, counts)
    # The label of a placeholder goes to the last of its expanded tokens; the others predict nothing.
    tails, is_input = np.cumsum(counts) - 1, counts > 0
    out_labels, out_weights = np.zeros(len(out_ids), np.int32), np.zeros(len(out_ids), np.float32)
    out_labels[tails[is_input]], out_weights[tails[is_input]] = labels[is_input], weights[is_input]
    for tail, piece in zip(tails[holders].tolist(), pieces, strict=True):
        out_ids[tail + 1 - len(piece) : tail + 1] = piece
    starts = np.searchsorted(out_branch, np.arange(branch[-1] + 1))  # first token of the trunk and of every branch
    positions = np.arange(len(out_ids)) - starts[out_branch]
    if len(starts) > 1:
        positions[starts[1] :] += starts[1]  # a branch continues after the trunk
    return Expanded(
        input_ids=out_ids,
        labels=out_labels,
        weights=out_weights,
        branch=out_branch.astype(np.int16),
        position_ids=positions.astype(np.int32),
        is_visual=_is_bidirectional(layout.tokens, out_ids) if visuals else np.zeros(len(out_ids), np.bool_),
    )


def allowed_pairs(tokens: Expanded) -> int:
    """The number of (query, key) pairs of one sample's tokens that the attention mask allows."""
    # A token sees those before it in its own branch, and a branch sees its whole trunk (branch 0).
    counts: list[int] = np.bincount(tokens.branch).tolist()
    trunk, *branches = counts
    causal = sum(count * (count + 1) // 2 for count in counts)
    visual = int(np.count_nonzero(tokens.is_visual))
    return causal + trunk * sum(branches) + visual * (visual - 1) // 2  # visual tokens see later ones too


def _is_bidirectional(tokens: VisualTokens, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    lowest, table = _bidirectional_table(tokens)
    places = ids - lowest
    inside = (places >= 0) & (places < len(table))
    inside[inside] = table[places[inside]]
    return inside


@functools.lru_cache(maxsize=16)
def _bidirectional_table(tokens: VisualTokens) -> tuple[int, npt.NDArray[np.bool_]]:
    """The lowest bidirectional id, and a table that says for each id from there on whether it is bidirectional."""
    ids = np.array(tokens.bidirectional)
    return int(ids.min()), np.isin(np.arange(ids.min(), ids.max() + 1), ids)
