"""Token counts, pooling and expansion of visuals, against the published geometry of Molmo2."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.format import TOKEN_DTYPE
from shards.layout import (
    VisualLayout,
    VisualTokens,
    expand,
    split_crops,
    visual_crops,
    visual_pooling,
    visual_tokens,
)

MOLMO2 = VisualLayout(
    tokens=VisualTokens.after(151_936), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
TINY = VisualLayout(
    tokens=VisualTokens.after(512), crop_size=48, patch_size=8, overlap_margin=1, image_pool=2, video_pool=3
)


@pytest.mark.parametrize(
    ("tiling", "patches", "tokens"),
    [
        ((1, 1), 392, 410),
        ((2, 2), 725, 752),
        ((2, 3), 955, 982),
        ((3, 4), 1582, 1619),
        ((2, 4), 1162, 1189),
        ((4, 2), 1162, 1208),
        ((4, 6), 2758, 2804),
        ((6, 4), 2758, 2823),
        ((4, 4), 1960, 2006),
        ((8, 1), 1316, 1400),
    ],
)
def test_image_token_counts_are_molmo2s(tiling: tuple[int, int], patches: int, tokens: int) -> None:
    visual = {"kind": "image", "tiling": list(tiling)}
    assert len(visual_tokens(MOLMO2, visual)) == tokens
    assert len(visual_pooling(MOLMO2, visual)) == patches


def test_a_frame_is_83_tokens() -> None:
    assert len(visual_tokens(MOLMO2, {"kind": "frame"})) == 83
    assert visual_pooling(MOLMO2, {"kind": "frame"}).shape == (81, 9)


@pytest.mark.parametrize("layout", [MOLMO2, TINY])
@given(rows=st.integers(1, 4), cols=st.integers(1, 4))
def test_pooling_covers_every_canvas_patch_once(layout: VisualLayout, rows: int, cols: int) -> None:
    """Every pixel of the canvas is pooled exactly once, in raster order of the windows."""
    visual = {"kind": "image", "tiling": [rows, cols]}
    side, patch = layout.crop_patches, layout.patch_size
    height, width = layout.canvas_size((rows, cols))
    number = np.arange(height // patch * (width // patch)).reshape(height // patch, width // patch)
    # A canvas whose pixels carry the number of their patch, cut as the loader cuts it.
    canvas = np.stack(
        [np.kron(part, np.ones((patch, patch))) for part in (number // 256, number % 256, number * 0)], -1
    )
    crops = split_crops(layout, (rows, cols), np.zeros((side * patch, side * patch, 3), np.uint8), canvas.astype("u1"))
    assert len(crops) == visual_crops(visual)
    carried = crops[:, ::patch, ::patch, 0].astype(int) * 256 + crops[:, ::patch, ::patch, 1]
    pooling = visual_pooling(layout, visual)[(-(-side // 2)) ** 2 :]
    seen = carried.reshape(-1)[pooling[pooling >= 0]]
    assert sorted(seen) == list(range(number.size))


def stored(*tokens: tuple[int, int, float]) -> np.ndarray:
    return np.array(list(tokens), TOKEN_DTYPE)


def test_expand_shifts_labels_inside_branches() -> None:
    holder = TINY.tokens.image
    tokens = stored((1, 0, 0), (holder, 0, 0), (5, 1, 0), (6, 1, 0.5), (1, 1, 0.5), (7, 2, 0), (8, 2, 1), (1, 2, 1))
    visuals = [{"kind": "image", "tiling": [1, 1]}]
    out = expand(TINY, tokens, visuals)
    image = len(visual_tokens(TINY, visuals[0]))
    assert len(out.input_ids) == 1 + image + 4
    assert out.input_ids[-4:].tolist() == [5, 6, 7, 8]
    assert out.labels[-4:].tolist() == [6, 1, 8, 1]
    assert out.weights[-4:].tolist() == [0.5, 0.5, 1, 1]
    assert not out.weights[:-4].any()
    assert out.branch[-4:].tolist() == [1, 1, 2, 2]
    trunk = 1 + image
    assert out.position_ids.tolist() == [*range(trunk), trunk, trunk + 1, trunk, trunk + 1]
    assert out.is_visual.sum() == image


def test_expand_refuses_missing_visuals_and_unordered_branches() -> None:
    with pytest.raises(ValueError, match="1 visual placeholders for 0 visuals"):
        expand(TINY, stored((1, 0, 0), (TINY.tokens.video, 0, 0)), [])
    with pytest.raises(ValueError, match="branches"):
        expand(TINY, stored((1, 0, 0), (5, 2, 0)), [])


def test_layout_survives_json() -> None:
    assert VisualLayout.from_json(MOLMO2.to_json()) == MOLMO2
