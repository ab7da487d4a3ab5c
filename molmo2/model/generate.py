"""Generation with a key/value cache for a batch of prompts of any lengths: greedy or sampled, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2.model.mask import PAD_SEGMENT, TRUNK, AttentionMask, KeyMask
from molmo2.model.molmo2 import Molmo2


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTensors:
    """One prompt with expanded placeholders; it ends where the answer begins."""

    input_ids: Tensor  # int64 [S]
    is_visual: Tensor  # bool [S]
    pixels: Tensor  # uint8 [N, H, W, 3]
    pooling: Tensor  # int64 [T, P] into the prompt's own flat patch axis; -1 pads

    @classmethod
    def of(cls, prompt: Any, device: torch.device | str = "cpu") -> PromptTensors:
        """Convert any object with these four arrays, such as the processor's `Prompt`."""
        return cls(**{item.name: torch.as_tensor(getattr(prompt, item.name), device=device) for item in fields(cls)})


def join_visuals(prompts: Sequence[PromptTensors], patches_per_crop: int) -> tuple[Tensor, Tensor]:
    """All crops [N, H, W, 3] and pooling indices [T, widest P] of a batch of prompts."""
    width = max(prompt.pooling.shape[1] for prompt in prompts)
    shifted, offset = [], 0
    for prompt in prompts:
        pooling = torch.where(prompt.pooling >= 0, prompt.pooling + offset, -1)
        shifted.append(F.pad(pooling, (0, width - pooling.shape[1]), value=-1))
        offset += prompt.pixels.shape[0] * patches_per_crop
    return torch.cat([prompt.pixels for prompt in prompts]), torch.cat(shifted)


def pad_left(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack 1-D tensors, shorter ones padded in front, so that all prompts end in the last column."""
    length = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (length - len(row), 0), value=value) for row in rows])


class Cache:
    """Keys and values of every layer so far, [B, Hkv, tokens, D] each."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens to a layer, and return all of the layer's."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self.layers[layer] = (k, v)
        return k, v


def prefill(model: Molmo2, prompts: Sequence[PromptTensors], cache: Cache) -> tuple[Tensor, Tensor]:
    """Run the prompts and fill the cache.

    Returns:
        The last token's hidden states [B, 1, d], and a bool [B, S] that is False for padding.
    """
    input_ids = pad_left([prompt.input_ids for prompt in prompts], 0)
    is_visual = pad_left([prompt.is_visual.long() for prompt in prompts], 0).bool()
    segment_ids = pad_left([torch.full_like(prompt.input_ids, TRUNK) for prompt in prompts], PAD_SEGMENT)
    valid = segment_ids != PAD_SEGMENT
    position_ids = (valid.cumsum(1) - 1).clamp(min=0)
    pixels, pooling = join_visuals(prompts, model.config.patches_per_crop)
    features = model.encode_visuals(pixels, pooling) if pixels.shape[0] else None
    mask = AttentionMask(segment_ids, is_visual)
    return model.decode(model.embed(input_ids, features), position_ids, mask, extend=cache.extend)[:, -1:], valid


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: a token is drawn from the smallest set of most likely tokens whose probabilities add up to at least
            this (nucleus sampling, Holtzman et al. 2020).
        seed: the same seed gives the same answers for the same batch on the same kind of device.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature {self.temperature} and top_p {self.top_p}: the first is 0 or more, the second in (0, 1]"
            )


GREEDY = Sampling()


def nucleus(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sampling probabilities float32 [B, V] from logits [B, V]; `temperature` must be above 0."""
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = sorted_.cumsum(-1) - sorted_
    truncated = sorted_ * (before < sampling.top_p)
    return torch.zeros_like(probabilities).scatter_(-1, order, truncated / truncated.sum(-1, keepdim=True))


@torch.no_grad()
def stream(
    model: Molmo2, prompts: Sequence[PromptTensors], max_new_tokens: int, eos_id: int, sampling: Sampling = GREEDY
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, [B] ids at a time; a prompt that has ended yields EOS from then on.

    It yields at most `max_new_tokens` (one or more) times and stops when all prompts have ended.
    """
    cache = Cache()
    hidden, valid = prefill(model, prompts, cache)
    generator = torch.Generator(hidden.device).manual_seed(sampling.seed)
    position_ids = valid.sum(1, keepdim=True)
    finished = torch.zeros_like(valid[:, 0])
    for left in reversed(range(max_new_tokens)):
        logits = model.lm_head(hidden[:, -1])
        if sampling.temperature:
            token = torch.multinomial(nucleus(logits, sampling), 1, generator=generator).squeeze(1)
        else:
            token = logits.argmax(-1)
        token = token.masked_fill(finished, eos_id)
        finished = finished | (token == eos_id)
        yield token.tolist()
        if not left or bool(finished.all()):
            return
        valid = F.pad(valid, (0, 1), value=True)
        hidden = model.decode(model.embed(token[:, None], None), position_ids, KeyMask(valid), extend=cache.extend)
        position_ids = position_ids + 1


def generate(
    model: Molmo2, prompts: Sequence[PromptTensors], max_new_tokens: int, eos_id: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """The continuation of each prompt, without EOS; at most `max_new_tokens` (one or more) tokens."""
    rows = zip(*stream(model, prompts, max_new_tokens, eos_id, sampling), strict=True)
    return [list(row[: row.index(eos_id)] if eos_id in row else row) for row in rows]
