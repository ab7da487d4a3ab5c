"""Conversion of weights between our names, those of the released checkpoints ("hub"), and transformers' ("native").

Both foreign forms can be read from a directory of safetensors files. A conversion reads nothing yet: it gives a
function for each of our tensors, which reads the rows of that tensor alone. Only the released form is written: fused
projections, separate base and added embedding rows, and the `config.json` for them. Reading a `config.json` is in
`molmo2.weights.config_json`; downloads from the hub, and base models, are in `molmo2.weights.pretrained`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molmo2.model.presets import ModelConfig, TextConfig
from shards.layout import VisualTokens

SHARD_BYTES = 4 << 30  # maximum bytes of tensors in one safetensors file, unless one tensor is larger
INDEX = "model.safetensors.index.json"

# One row for each tensor: our name, the hub name, the native name; N is a layer number. A name that ends with a dot is
# a prefix, so that one row serves both weight and bias. Rows with the same hub name are parts of one fused tensor, in
# this order. None: the native form has no such tensor.
_NAMES = (
    (
        "vit.positions",
        "model.vision_backbone.image_vit.positional_embedding",
        "model.vision_tower.positional_embedding",
    ),
    ("vit.patch_embedding.", "model.vision_backbone.image_vit.patch_embedding.", "model.vision_tower.patch_embedding."),
    *(
        (
            f"vit.blocks.N.{ours}.",
            f"model.vision_backbone.image_vit.transformer.resblocks.N.{hub}.",
            f"model.vision_tower.layers.N.{native}.",
        )
        for ours, hub, native in (
            *((f"attention.{x}_proj", f"attention.w{x}", f"self_attn.{x}_proj") for x in "qkvo"),
            ("norm1", "attention_norm", "layer_norm1"),
            ("norm2", "ffn_norm", "layer_norm2"),
            ("fc1", "feed_forward.w1", "mlp.fc1"),
            ("fc2", "feed_forward.w2", "mlp.fc2"),
        )
    ),
    *(
        (
            f"connector.pooling.{x}_proj.",
            f"model.vision_backbone.image_pooling_2d.w{x}.",
            f"model.multi_modal_projector.image_pooling_2d.{x}_proj.",
        )
        for x in "qkvo"
    ),
    *(
        (
            f"connector.{name}_proj.weight",
            f"model.vision_backbone.image_projector.{hub}.weight",
            f"model.multi_modal_projector.image_projector.{name}_proj.weight",
        )
        for name, hub in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    ),
    ("text.embedding.base", "model.transformer.wte.embedding", "model.language_model.embed_tokens.weight"),
    ("text.embedding.added", "model.transformer.wte.new_embedding", None),
    ("text.norm.weight", "model.transformer.ln_f.weight", "model.language_model.norm.weight"),
    *(
        (f"text.layers.N.{ours}", f"model.transformer.blocks.N.{hub}", f"model.language_model.layers.N.{native}")
        for ours, hub, native in (
            ("attention.q_proj.weight", "self_attn.att_proj.weight", "self_attn.q_proj.weight"),
            ("attention.k_proj.weight", "self_attn.att_proj.weight", "self_attn.k_proj.weight"),
            ("attention.v_proj.weight", "self_attn.att_proj.weight", "self_attn.v_proj.weight"),
            ("attention.o_proj.weight", "self_attn.attn_out.weight", "self_attn.o_proj.weight"),
            ("attention.q_norm.weight", "self_attn.q_norm.weight", "self_attn.q_norm.weight"),
            ("attention.k_norm.weight", "self_attn.k_norm.weight", "self_attn.k_norm.weight"),
            ("attention_norm.weight", "attn_norm.weight", "input_layernorm.weight"),
            ("up_proj.weight", "mlp.ff_proj.weight", "mlp.up_proj.weight"),
            ("gate_proj.weight", "mlp.ff_proj.weight", "mlp.gate_proj.weight"),
            ("down_proj.weight", "mlp.ff_out.weight", "mlp.down_proj.weight"),
            ("mlp_norm.weight", "ff_norm.weight", "post_attention_layernorm.weight"),
        )
    ),
    ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
)


class WeightsError(ValueError):
    """The tensors of a checkpoint are not those of the model; the message lists them."""


def native_name(name: str) -> str | None:
    """The native name of our tensor; None for the added embedding rows, which the native form appends to the base."""
    return _foreign(name, 2)


def _foreign(name: str, column: int) -> str | None:
    """The name of our tensor in the hub form (`column` 1) or the native form (2); None if that form has none."""
    number = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".N.", name, count=1)
    for row in _NAMES:
        ours, theirs = row[0], row[column]
        if pattern == ours or (ours.endswith(".") and pattern.startswith(ours)):
            if theirs is None:
                return None
            theirs += pattern[len(ours) :]
            return theirs.replace(".N.", f".{number[1]}.") if number else theirs
    raise KeyError(f"no foreign name is known for {name}")


def to_hub(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Convert our weights to the released layout: q, k, v are fused into one tensor, and up, gate into another."""
    fused: dict[str, list[Tensor]] = {}
    order = [name for row in _NAMES for name in _expand(row[0], weights)]
    assert sorted(order) == sorted(weights), sorted(set(order) ^ set(weights))
    for name in order:
        hub = _foreign(name, 1)
        assert hub is not None
        fused.setdefault(hub, []).append(weights[name])
    for hub, parts in fused.items():
        yield hub, torch.cat(parts) if len(parts) > 1 else parts[0]


def _expand(pattern: str, weights: Mapping[str, Tensor]) -> list[str]:
    """All our names that match a name of the table."""
    regex = re.compile(re.escape(pattern).replace(r"\.N\.", r"\.\d+\.") + (".*" if pattern.endswith(".") else "") + "$")
    return [name for name in weights if regex.match(name)]


class Rows(Protocol):
    """A tensor that is given by its rows: a stored one, of which only these are read, or one in memory."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the whole tensor."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of its rows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; its rows are read as float32, into memory of their own.

    The file is mapped only for the read, so that its pages do not stay in memory.
    """

    file: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        with safe_open(self.file, "pt") as handle:
            tensor = handle.get_slice(self.name)[rows] if self.shape else handle.get_tensor(self.name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise WeightsError(f"{self.file}: {self.name} is {tensor.dtype}; give weights that are not quantised")
        return tensor.to(torch.float32, copy=True)

    def __call__(self) -> Tensor:
        """Read the whole tensor."""
        return self[:]


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory's safetensors files, by name; if there is an index, it determines the files.

    Raises:
        FileNotFoundError: there is no safetensors file.
        WeightsError: a file is truncated, damaged or missing, or lacks a tensor that the index names.
    """
    index = directory / INDEX
    weight_map = _weight_map(index) if index.exists() else {}
    files = sorted({directory / file for file in weight_map.values()}) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: no *.safetensors file in it")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():
                    tensors[name] = StoredTensor(file, name, tuple(handle.get_slice(name).get_shape()))
        except FileNotFoundError:
            raise WeightsError(f"{file} is missing, but {INDEX} names it; fetch or export it again") from None
        except SafetensorError as error:
            raise WeightsError(f"{file}: no readable safetensors file ({error}); fetch or export it again") from None
    problems = [
        f"{name} is not in {file}"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if problems:
        raise WeightsError(f"{index} does not fit the files beside it:\n  " + "\n  ".join(problems))
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: no readable index ({error!r}); fetch or export it again") from None


def from_foreign(shapes: Mapping[str, torch.Size], tensors: Mapping[str, Rows]) -> dict[str, Callable[[], Tensor]]:
    """Convert the tensors of a hub or native checkpoint to our weights; `shapes` are those of our model.

    Returns and raises what `collect` does.
    """
    native = any(name.startswith("model.language_model.") for name in tensors)
    split: dict[str, list[str]] = {}
    order = [name for row in _NAMES for name in _expand(row[0], shapes)]  # type: ignore[arg-type]
    for name in order:
        foreign = _foreign(name, 2 if native else 1)
        split.setdefault(foreign or "model.language_model.embed_tokens.weight", []).append(name)
    return collect(shapes, split, tensors)


def collect(
    shapes: Mapping[str, torch.Size], split: Mapping[str, list[str]], tensors: Mapping[str, Rows]
) -> dict[str, Callable[[], Tensor]]:
    """Find our tensors in the rows of foreign ones, without reading them.

    Args:
        shapes: the shapes of our tensors, by name.
        split: for each foreign name, the names of our tensors whose rows it holds, in order.
        tensors: the foreign tensors.

    Returns:
        For each of our names a function that reads the tensor. It raises a WeightsError if the tensor is quantised or
        not finite.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape; all of them are listed.
    """
    problems = [f"missing {name}" for name in sorted(split.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - split.keys())]
    weights: dict[str, Callable[[], Tensor]] = {}
    for foreign, names in split.items():
        if foreign not in tensors:
            continue
        tensor, wanted = tensors[foreign], [sum(shapes[name][0] for name in names), *shapes[names[0]][1:]]
        if list(tensor.shape) != wanted:
            problems.append(f"{foreign}: shape {list(tensor.shape)}, wanted {wanted}")
        start = 0
        for name in names:
            rows = slice(start, start + shapes[name][0])
            weights[name] = partial(_read_finite, foreign, tensor, rows)
            start = rows.stop
    if problems:
        raise WeightsError(_misfit(problems))
    return weights


def _misfit(problems: list[str]) -> str:
    return "the checkpoint does not fit the model:\n  " + "\n  ".join(problems)


def _read_finite(foreign: str, tensor: Rows, rows: slice) -> Tensor:
    part = tensor[rows]
    if not part.is_meta and not part.sum().isfinite():
        raise WeightsError(_misfit([f"{foreign}: holds infinity or NaN"]))
    return part


def write_hub(weights: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write our weights in the released layout: one safetensors file, or shards and their index.

    Raises:
        OSError: a file cannot be written.
    """
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(to_hub(weights), shard_bytes):
        path = directory / f"part-{len(parts)}.safetensors"
        try:
            save_file(shard, path, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{directory}: weights cannot be written ({error}); is the disk full?") from None
        path.chmod(0o644)  # safetensors lets only the owner read a new file
        parts.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(parts) == 1:
        parts[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards of at most `shard_bytes`, or of one larger tensor; only one shard is in memory."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        # A tied head shares memory with the embedding, and safetensors refuses to store one tensor twice.
        shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if shared else tensor.contiguous()
        size += tensor.nbytes
    yield shard


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json` with the keys of the released checkpoints, which transformers and vLLM read."""
    tokens = VisualTokens.after(config.text.vocab_size)
    # Without `attn_implementation` the released code computes all scores of a layer at once.
    shared = {"attn_implementation": "sdpa", "residual_dropout": 0.0, "attention_dropout": 0.0}
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "dtype": "float32",
        "image_start_token_id": tokens.im_start,
        "image_end_token_id": tokens.im_end,
        "image_patch_id": tokens.im_patch,
        "image_col_id": tokens.im_col,
        "low_res_image_start_token_id": tokens.low_res_im_start,
        "image_low_res_id": tokens.im_low,
        "image_high_res_id": tokens.im_patch,
        "frame_start_token_id": tokens.frame_start,
        "frame_end_token_id": tokens.frame_end,
        "use_frame_special_tokens": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "vit_config": {
            "model_type": "molmo2",
            "hidden_size": config.vit.hidden_size,
            "intermediate_size": config.vit.intermediate_size,
            "num_hidden_layers": config.vit.num_layers,
            "num_attention_heads": config.vit.num_heads,
            "num_key_value_heads": config.vit.num_heads,
            "head_dim": config.vit.head_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": config.vit.norm_eps,
            "image_default_input_size": [config.crop_size, config.crop_size],
            "image_patch_size": config.patch_size,
            "image_num_pos": config.patches_per_crop,
            "float32_attention": True,
            "initializer_range": 0.02,
            **shared,
        },
        "adapter_config": {
            "model_type": "molmo2",
            "vit_layers": list(config.vit.feature_layers),
            "pooling_attention_mask": True,
            "hidden_size": config.connector.hidden_size,
            "num_attention_heads": config.connector.num_heads,
            "num_key_value_heads": config.connector.num_heads,
            "head_dim": config.connector.head_dim,
            "hidden_act": "silu",
            "intermediate_size": config.connector.intermediate_size,
            "text_hidden_size": config.text.hidden_size,
            "float32_attention": True,
            "image_feature_dropout": 0.0,
            "initializer_range": 0.02,
            **shared,
        },
        "text_config": _hub_text_config(config.text) | shared,
    }


def _hub_text_config(text: TextConfig) -> dict[str, Any]:
    scaling = text.rope_scaling and {
        "rope_type": "yarn",
        "factor": text.rope_scaling.factor,
        "attention_factor": text.rope_scaling.attention_factor,
        "beta_fast": text.rope_scaling.beta_fast,
        "beta_slow": text.rope_scaling.beta_slow,
        "original_max_position_embeddings": text.rope_scaling.original_max_positions,
    }
    return {
        "model_type": "molmo2_text",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "additional_vocab_size": text.additional_vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_theta,
        "rope_scaling": scaling,
        "rope_scaling_layers": list(text.rope_scaling.layers) if text.rope_scaling else None,
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": text.qk_norm,
        "layer_norm_eps": text.norm_eps,
        "norm_after": text.norm_after,
        "embedding_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
    }
