"""The connector's attention beside torch's own, and the operations that return gradients to patches and features."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from molmo2.model.connector import AttentionPooling, Connector
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS

CONFIG = PRESETS["tiny"]


class Operations(TorchDispatchMode):
    """Records the names of all operations, and the indices of every `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.added: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__.startswith("index_add"):
            self.added.append(args[2])
        return func(*args, **(kwargs or {}))


def windows(size: int, pads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three crops and pooling indices, a third of which are pads if `pads`."""
    generator = torch.Generator().manual_seed(size)
    width = CONFIG.vit.hidden_size * len(CONFIG.vit.feature_layers)
    features = torch.randn(3, CONFIG.patches_per_crop, width, generator=generator)
    order = torch.randperm(features.shape[0] * features.shape[1], generator=generator)
    pooling = order[: len(order) // size * size].view(-1, size)
    if pads:
        hidden = torch.rand(pooling.shape, generator=generator) < 1 / 3
        hidden[:, 1] = False  # every window has a patch
        pooling = pooling.masked_fill(hidden, -1)
    return features, pooling


def by_kernel(pooling: AttentionPooling, windows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`AttentionPooling` by torch's scaled dot product attention."""
    query = windows.sum(1, keepdim=True) / valid.sum(1)[:, None, None]
    q, k, v = (
        proj(x).unflatten(-1, (pooling.num_heads, -1)).transpose(1, 2)
        for proj, x in ((pooling.q_proj, query), (pooling.k_proj, windows), (pooling.v_proj, windows))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
    return pooling.o_proj(out.transpose(1, 2).flatten(1))


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("size", [4, 9])
def test_attention_of_a_window_equals_that_of_the_kernels(size: int, pads: bool) -> None:
    torch.manual_seed(0)
    features, indices = windows(size, pads)
    valid = indices >= 0
    pooling = AttentionPooling(CONFIG.connector, features.shape[-1])
    inputs = features.flatten(0, 1)[indices.clamp(min=0)] * valid[..., None]
    gradient = torch.randn(len(indices), CONFIG.connector.hidden_size)
    results = []
    for run in (pooling, lambda x, valid: by_kernel(pooling, x, valid)):
        leaf = inputs.clone().requires_grad_()
        out = run(leaf, valid)
        results.append([out.detach(), *torch.autograd.grad(out, [leaf, *pooling.parameters()], gradient)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_no_kernel_is_asked_for_windows() -> None:
    connector = Connector(CONFIG.connector, CONFIG.vit, CONFIG.text)
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError):
        assert connector(*windows(9, pads=True)).isfinite().all()


def test_a_window_without_patches_is_zero_before_the_projection_and_spoils_no_gradient() -> None:
    pooling = AttentionPooling(CONFIG.connector, 6)
    inputs = torch.randn(2, 4, 6).requires_grad_()
    out = pooling(inputs, torch.tensor([[True] * 4, [False] * 4]))
    torch.testing.assert_close(out[1], pooling.o_proj.bias)
    out.sum().backward()
    assert inputs.grad is not None and inputs.grad.isfinite().all()


@pytest.mark.slow
def test_gradients_of_pads_go_to_many_patches_and_never_through_a_serial_scatter() -> None:
    features, indices = windows(9, pads=True)
    connector = Connector(CONFIG.connector, CONFIG.vit, CONFIG.text)
    with Operations() as operations:
        connector(features.requires_grad_(), indices).sum().backward()
    assert not {name for name in operations.names if "index_put" in name}
    (added,) = operations.added
    assert int(added.bincount().max()) <= indices.shape[1]  # one patch takes the pads of its own window only
    assert features.grad is not None
    unused = torch.ones(features.shape[0] * features.shape[1], dtype=torch.bool)
    unused[indices[indices >= 0]] = False
    assert not features.grad.flatten(0, 1)[unused].any()


def patch_tokens(count: int) -> tuple[Molmo2, torch.Tensor, torch.Tensor]:
    """A model, two rows of ids of which seven are patch tokens, and `count` features."""
    model = Molmo2(CONFIG).init_weights()
    ids = torch.arange(24).view(2, 12)
    ids.flatten()[[1, 2, 5, 11, 12, 20, 23]] = CONFIG.image_patch_id
    return model, ids, torch.randn(count, CONFIG.text.hidden_size)


def test_the_k_th_patch_token_gets_the_k_th_feature_and_gradients_are_read_not_scattered() -> None:
    model, ids, features = patch_tokens(7)
    expected = model.text.embedding(ids)
    expected[ids == CONFIG.image_patch_id] += features
    x = model.embed(ids, features.requires_grad_())
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    weight = torch.randn(x.shape)
    model.requires_grad_(False)
    with Operations() as operations:
        (model.embed(ids, features) * weight).sum().backward()
    assert not {name for name in operations.names if "index_put" in name}
    assert len(operations.added) == 1  # in forward; backward is a read
    torch.testing.assert_close(features.grad, weight[ids == CONFIG.image_patch_id], rtol=0, atol=0)


@pytest.mark.parametrize("count", [6, 8])
def test_features_and_patch_tokens_of_different_numbers_are_an_error(count: int) -> None:
    model, ids, features = patch_tokens(count)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model.embed(ids, features)
