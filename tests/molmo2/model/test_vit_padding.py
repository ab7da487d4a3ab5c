"""Crops that are padded to a multiple change nothing but the number of shapes that kernels see."""

import torch
from packed_rows import build, image
from tiny_models import QWEN, noisy_model

from molmo2.config import CHUNK_CROPS
from molmo2.training.engine import PAD_CROPS


def test_padded_crops_change_no_gradient() -> None:
    model = noisy_model().train()
    row = build(QWEN, [([image(1, 2), image(2, 2)], [5, 7])])
    gradients = []
    for pad, chunk in ((1, None), (3, None), (5, 5), (16, 16), (16, 32)):
        model.vit.pad_crops = pad
        model.set_recompute("full", chunk)
        model.zero_grad()
        model(**row).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert row["pixels"].shape[0] == 8
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_chunks_of_padded_crops_have_few_shapes() -> None:
    """And fewer crops are added than are padded to."""
    vit = noisy_model().vit.eval()
    vit.pad_crops, vit.chunk_crops = PAD_CROPS, CHUNK_CROPS
    shapes, sizes = set(), []
    vit.blocks[0].register_forward_pre_hook(lambda block, arguments: sizes.append(len(arguments[0])))
    side = QWEN.crop_size
    for crops in range(1, 2 * CHUNK_CROPS + 2):
        with torch.no_grad():
            assert len(vit(torch.zeros(crops, side, side, 3, dtype=torch.uint8))) == crops
        assert sum(sizes) == crops + vit.num_padded(crops) < crops + PAD_CROPS
        shapes |= set(sizes)
        sizes.clear()
    assert shapes == {8, 16, 24, 32}
