"""The Molmo2 model: vision transformer, connector and language model.

Visual features are added to the embeddings of the `<im_patch>` tokens, in row-major order. Parallelism (sequence
slices, splits of the vision work, sharded parameters) is not in the model: `molmo2.training.engine` applies it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from molmo2.model.attention import masked_attention
from molmo2.model.connector import Connector
from molmo2.model.decoder import Attend, Decoder, Extend, Mask
from molmo2.model.dropout import Dropout
from molmo2.model.loss import Head
from molmo2.model.mask import AttentionMask
from molmo2.model.presets import PRECISION_NAMES, ModelConfig
from molmo2.model.vit import VisionTransformer

PRECISIONS = dict(zip(PRECISION_NAMES, (torch.bfloat16, torch.float32), strict=True))


def inference_dtype(device: torch.device | str, precision: str | None = None) -> torch.dtype:
    """The dtype in which a model answers: that of `precision`, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: `precision` is neither None nor a key of `PRECISIONS`.
    """
    if precision is None:
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose one of {', '.join(PRECISIONS)}, or none")
    return PRECISIONS[precision]


class Molmo2(nn.Module):
    """The whole model. Tests and evaluation call `forward`; the trainer composes the four parts itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(config.vit, config.patch_size, config.patches_per_crop)
        self.connector = Connector(config.connector, config.vit, config.text)
        self.text = Decoder(config.text)
        self.lm_head = Head(config.text.hidden_size, config.text.vocab_size, bias=False)

    @classmethod
    def with_weights(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> Molmo2:
        """A model with these tensors as its parameters; they are not copied.

        Raises:
            RuntimeError: a tensor is missing, unexpected or of another shape.
        """
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        return model

    @classmethod
    def for_inference(
        cls,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        device: torch.device | str,
        precision: str | None = None,
    ) -> Molmo2:
        """A model in evaluation mode on a device; `precision`: see `inference_dtype`. `weights` stay as they are.

        Raises:
            RuntimeError: a tensor is missing, unexpected or of another shape.
            ValueError: there is no such precision.
        """
        dtype = inference_dtype(device, precision)
        return cls.with_weights(config, {name: value.to(device, dtype) for name, value in weights.items()}).eval()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Molmo2:
        """Initialize all weights with `random_weights`."""
        parameters = dict(self.named_parameters())
        for name, tensor in self.random_weights(seed):
            parameters[name].copy_(tensor)
        return self

    def random_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Draw float32 weights on the CPU, one at a time: activations of about unit size, zero biases, norms 1.

        A fixed std of 0.02 suits wide models only: at the width of `tiny` the gradients of the vision transformer would
        be below Adam's epsilon. Only the head has std 0.02, so that training starts from nearly uniform predictions.
        """
        generator = torch.Generator().manual_seed(seed)
        stds = {"vit.positions": 1.5, "text.embedding.base": 0.5, "text.embedding.added": 0.5, "lm_head.weight": 0.02}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                yield name, torch.zeros(parameter.shape)
            elif "norm" in name:
                yield name, torch.ones(parameter.shape)
            else:
                std = stds.get(name, parameter.shape[-1] ** -0.5)
                yield name, torch.empty(parameter.shape).normal_(0, std, generator=generator)

    def set_recompute(self, level: str, chunk_crops: int | None = None, offload: bool = False) -> None:
        """Set which activations are computed again in backward instead of saved.

        Args:
            level: "none"; "full": of every layer only the input is saved; "light": in the language model also the
                inputs and the result of attention, which is the part that takes longest to compute again.
            chunk_crops: the vision transformer processes this many crops at a time, so that a layer is recomputed for
                a chunk and not for 384 frames at once.
            offload: with "full", the saved inputs of layers are kept in CPU memory.
        """
        self.text.recompute, self.vit.recompute = level, level != "none"
        self.vit.offload = self.text.offload = offload
        self.vit.chunk_crops = chunk_crops

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each component that has a learning rate; the added embeddings belong to the connector."""
        groups: dict[str, list[nn.Parameter]] = {"vit": [], "connector": [], "llm": []}
        for name, parameter in self.named_parameters():
            if name.startswith("vit."):
                groups["vit"].append(parameter)
            elif name.startswith("connector.") or name == "text.embedding.added":
                groups["connector"].append(parameter)
            else:
                groups["llm"].append(parameter)
        return groups

    def freeze(self, components: Collection[str], base_embedding: bool = False) -> None:
        """Train no parameter of these components of `parameter_groups`, nor the base embeddings if they are frozen."""
        groups = self.parameter_groups()
        for parameter in [parameter for name in components for parameter in groups[name]]:
            parameter.requires_grad_(False)
        if base_embedding:
            self.text.embedding.base.requires_grad_(False)

    def encode_visuals(self, pixels: Tensor, pooling: Tensor) -> Tensor:
        """Encode uint8 crops [N, H, W, 3] with pooling int64 [T, P] to visual features [T, d]."""
        trained = any(parameter.requires_grad for parameter in self.vit.parameters())
        # Nothing before the vision transformer is trained. Offloaded checkpointing would make its input need gradients.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            patches = self.vit(pixels)
        return self.connector(patches, pooling)

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embed int64 ids [B, S] to [B, S, d], adding features [T, d], one for each `<im_patch>`."""
        x = self.text.embedding(input_ids)
        if features is None or features.shape[0] == 0:
            return x
        # The k-th patch token gets the k-th feature. Each place is added to once, so backward is a plain read. Row 0 of
        # `places` takes the tokens that are no patches. With fewer patch tokens than features a place stays -1, with
        # more of them the index is too large; both are errors.
        is_patch = (input_ids == self.config.image_patch_id).flatten()
        places = is_patch.new_full((len(features) + 1,), -1, dtype=torch.int64)
        number = is_patch.cumsum(0) * is_patch
        places.scatter_(0, number, torch.arange(len(number), device=number.device))
        return x.flatten(0, 1).index_add(0, places[1:], features.to(x.dtype)).view_as(x)

    def decode(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: Mask,
        attend: Attend = masked_attention,
        extend: Extend | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Map embeddings [B, S, d] and positions int64 [B, S] to final-normed hidden states [B, S, d]."""
        return self.text(x, position_ids, mask, attend, extend, dropout)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        is_visual: Tensor,
        pixels: Tensor,
        pooling: Tensor,
    ) -> Tensor:
        """Logits [B, S, base vocabulary] of a batch from the loader; `pixels` may be empty."""
        features = self.encode_visuals(pixels, pooling) if pixels.shape[0] else None
        hidden = self.decode(self.embed(input_ids, features), position_ids, AttentionMask(segment_ids, is_visual))
        logits: Tensor = self.lm_head(hidden)
        return logits
