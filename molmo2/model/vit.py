"""The vision transformer: it maps uint8 crops to the patch features of two blocks.

The structure is SigLIP2's: linear patch embedding, learned positions, pre-norm blocks with biases, no CLS token and no
final norm. Positions are not interpolated, since crops always have the configured size.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo2.model.presets import VitConfig
from molmo2.model.recompute import recomputed


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Split uint8 crops [N, H, W, 3] into float32 patches [N, patches, patch * patch * 3] in [-1, 1], channels last."""
    count, height, width, channels = pixels.shape
    rows, cols = height // patch_size, width // patch_size
    grid = pixels.view(count, rows, patch_size, cols, patch_size, channels).transpose(2, 3)
    # The reference scales to 0-1 first; the same order of operations gives the same bits.
    return (grid.reshape(count, rows * cols, patch_size * patch_size * channels).float() / 255 - 0.5) / 0.5


class Attention(nn.Module):
    """Self-attention over the patches of one crop.

    It runs in bfloat16 too: torch's fused kernels compute scores and softmax in float32 and round only probabilities.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, patches, width] to [N, patches, width]."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, patches, width] to [N, patches, width]."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class VisionTransformer(nn.Module):
    """The vision transformer, which maps crops to the features that the connector pools.

    `block` runs a block; `compile_regions` puts a compiled function into an instance.
    """

    block = staticmethod(Block.__call__)

    def __init__(self, config: VitConfig, patch_size: int, num_patches: int) -> None:
        super().__init__()
        self.config, self.patch_size = config, patch_size
        self.recompute = self.offload = False  # whether a block is recomputed in backward, its input in CPU memory
        self.chunk_crops: int | None = None  # crops computed at once; None: all
        self.pad_crops = 1  # crops are padded to a multiple of this number, so that kernels see few shapes
        self.patch_embedding = nn.Linear(patch_size * patch_size * 3, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(num_patches, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode uint8 [N, H, W, 3] to [N, patches, hidden * feature layers]."""
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self.num_padded(len(pixels))))
        parts = [self._encode(part) for part in padded.split(self.chunk_crops or max(1, len(padded)))]
        return torch.cat(parts)[: len(pixels)]

    def num_padded(self, num_crops: int) -> int:
        """The number of black crops that are computed beside `num_crops`, less than `pad_crops`."""
        return -num_crops % self.pad_crops

    def _encode(self, pixels: Tensor) -> Tensor:
        patches = to_patches(pixels, self.patch_size).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(patches) + self.positions
        outputs = {}
        for number, block in enumerate(self.blocks):
            run = functools.partial(self.block, block)
            x = recomputed(run, x, offload=self.offload) if self.recompute and self.training else run(x)
            if number in self.config.feature_layers:
                outputs[number] = x
        return torch.cat([outputs[number] for number in self.config.feature_layers], dim=-1)
