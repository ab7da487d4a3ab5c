"""Pretrained weights: base models to start training from, and whole Molmo2 models to train further or to use.

The trainer calls `first_weights`; evaluation, chat and export call `load_released` for released or exported
directories. Every tensor of a checkpoint must be used, or match a pattern of the tensors that are left out on purpose;
any other tensor is an error. `first_weights` reads no tensor: it gives functions that do, so that the trainer holds one
tensor at a time. Names of Molmo2's own tensors are in `molmo2.weights.names`; `config.json` is read in
`molmo2.weights.config_json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer
from torch import Tensor

from molmo2.config import FirstWeights, data_path
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig, config_differences
from molmo2.weights.config_json import read_base_text, read_molmo2, read_siglip
from molmo2.weights.names import Rows, StoredTensor, WeightsError, collect, from_foreign, native_name, open_tensors

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # files to download: weights, configuration, tokenizer
STD = 0.02  # standard deviation of new connector weights and added embedding rows beside pretrained base models
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

# Patterns of tensors that are left out on purpose, with the reason.
_SIGLIP_UNUSED = {
    r"text_model\..*": "Molmo2 has a language model of its own",
    r"logit_(scale|bias)": "parts of SigLIP's loss",
    r"vision_model\.head\..*": "pools one vector from an image; Molmo2 pools windows of patches",
    r"vision_model\.post_layernorm\..*": "after the last block; Molmo2 uses the features of blocks without it",
    r"vision_model\.embeddings\.position_ids": "a buffer of older files: 0, 1, 2, ...",
}
_TEXT_UNUSED = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "a buffer of older files, computed here"}
_TIED_UNUSED = {r"lm_head\.weight": "the head is tied: the embedding table once more"}


class PretrainedError(ValueError):
    """Weights cannot be found or downloaded, or belong to another model than the recipe's."""


# --- finding ---------------------------------------------------------------------------------------------------------


def locate(name: str | Path) -> Path:
    """The directory of a model: a path, a path below `MOLMO2_DATA`, or a download of OWNER/NAME[@REVISION].

    Downloads are kept in the cache of `huggingface_hub`, in a directory named after the commit.

    Raises:
        PretrainedError: there is no such directory or repository, or the hub refuses the download.
    """
    for path in (Path(name), data_path(name)):
        if path.is_dir():
            return path
    match = _REPO.fullmatch(str(name))
    if not match:
        raise PretrainedError(f"{name}: no such directory, here or in {data_path()}, and no OWNER/NAME of the hub")
    return _fetch(match["repo"], match["revision"] or "main")


def _fetch(repo: str, revision: str) -> Path:
    page = f"{constants.ENDPOINT}/{repo}"
    try:
        # Folders are left out: some repositories keep the same weights in other formats there.
        directory = snapshot_download(repo, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    except GatedRepoError:
        reason = f"is gated; accept its terms at {page}, then log in (hf auth login) or set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = (
            f"is not at {page}, or is private and you are not logged in (hf auth login); nor is it a directory here"
        )
    except RevisionNotFoundError:
        reason = f"has no revision {revision}; see {page}/tree/main"
    except LocalEntryNotFoundError:
        reason = f"is not in the cache ({constants.HF_HUB_CACHE}), and the hub cannot be reached; check the network, "
        reason += "HF_ENDPOINT and HF_HUB_OFFLINE, or download it elsewhere and give the directory"
    except (HFValidationError, OSError) as error:
        reason = f"cannot be fetched from {page}: {error}".splitlines()[0] + "; try again, or give a directory"
    else:
        return Path(directory)
    raise PretrainedError(f"{repo} {reason}")


# --- whole models ----------------------------------------------------------------------------------------------------


def load_released(name: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Load a Molmo2 model with a `config.json`: released, exported by this project, or saved by transformers.

    Returns:
        Its configuration, and its float32 weights by our names.

    Raises:
        PretrainedError: the directory or repository cannot be found.
        ForeignConfigError: it is another kind of model.
        WeightsError: tensors are missing, unexpected, damaged or of another shape.
    """
    directory = locate(name)
    config = read_molmo2(directory)
    return config, {name: read() for name, read in _released_weights(directory, config).items()}


def _released_weights(directory: Path, config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    blocks = r"model\.(vision_backbone\.image_vit\.transformer\.resblocks|vision_tower\.layers)"
    tensors = _used(open_tensors(directory), _deeper_blocks(blocks, config))
    return from_foreign(_shapes(config), _joined_embedding(tensors, config.text.vocab_size))


def _deeper_blocks(prefix: str, config: ModelConfig, count: int = 64) -> dict[str, str]:
    """Patterns of the vision blocks that are left out; the checkpoint has at most `count` blocks."""
    reason = "after the last block whose features are used"
    return {rf"{prefix}\.{number}\..*": reason for number in range(config.vit.num_layers, count)}


@dataclass(frozen=True, slots=True)
class _Derived:
    """A tensor made from stored ones: `read` gives some of its rows."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read(rows)


def _joined_embedding(tensors: Mapping[str, StoredTensor], rows: int) -> Mapping[str, Rows]:
    """Repair an embedding saved by transformers 5, which splits the whole table in half, not at the added rows."""
    names = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
    if not all(name in tensors for name in names):
        return tensors
    first, second = (tensors[name] for name in names)
    half, width = first.shape
    if first.shape != second.shape or half >= rows:
        return tensors
    base = _Derived((rows, width), lambda part: torch.cat([first[:], second[: rows - half]])[part])
    added = _Derived((2 * half - rows, width), lambda part: second[rows - half :][part])
    return {**tensors, **dict(zip(names, (base, added), strict=True))}


def _used(tensors: Mapping[str, StoredTensor], unused: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors whose names match none of the `unused` patterns."""
    pattern = re.compile("|".join(unused) or "(?!)")
    return {name: tensor for name, tensor in tensors.items() if not pattern.fullmatch(name)}


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Molmo2(config).state_dict().items()}


# --- first weights of a run ------------------------------------------------------------------------------------------


def first_weights(
    init: FirstWeights, config: ModelConfig, tokenizer_dir: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Callable[[], Tensor]]:
    """Find the float32 weights of a run that starts from pretrained weights.

    Args:
        init: the sources of the weights.
        config: the recipe's model.
        tokenizer_dir: the recipe's tokenizer; it must have the token ids with which the weights were trained.
        seed: seed of the weights that no base model has.
        say: reports the directory of each source, which for downloads is named after the commit.

    Returns:
        For each of our names a function that reads the tensor, into memory of its own. It raises a WeightsError if the
        tensor is quantised or not finite.

    Raises:
        PretrainedError: a source cannot be found, or belongs to another model or tokenizer.
        ForeignConfigError: a checkpoint is another kind of model.
        WeightsError: tensors are missing, unexpected or of another shape, or a file is damaged.
    """
    directories = {key: locate(name) for key, name in init.model_dump().items() if name is not None}
    for key, directory in directories.items():
        say(f"init.{key}: {getattr(init, key)}, read from {directory}")
    if init.molmo2:
        directory = directories["molmo2"]
        # No weight depends on the maximum number of positions, so it may differ.
        _refuse_other("molmo2", directory, config_differences(read_molmo2(directory), config, ["text.max_positions"]))
        check_tokenizer(directory, tokenizer_dir, config.text.vocab_size)
        return _released_weights(directory, config)
    weights = _new_weights(config, seed)
    weights |= _text_weights(directories["llm"], config)
    weights |= _vision_weights(directories["vit"], config)
    check_tokenizer(directories["llm"], tokenizer_dir, config.text.vocab_size)
    return weights


def _refuse_other(key: str, directory: Path, differing: list[str]) -> None:
    if differing:
        raise PretrainedError(
            f"init.{key}: {directory} is another model than the recipe's `model`: {'; '.join(differing)}; "
            "name the checkpoint that belongs to the preset, or another preset"
        )


def check_tokenizer(directory: Path, tokenizer_dir: Path, vocab_size: int) -> None:
    """Check that a tokenizer gives tokens the ids with which weights were trained.

    Args:
        directory: the weights; without a `tokenizer.json` beside them nothing is checked.
        tokenizer_dir: the tokenizer to use. It may have unused extra tokens in place of missing ones, with which
            `write_tokenizer` fills the rows between the tokenizer's entries and the base embedding table.
        vocab_size: rows of the base embedding table.

    Raises:
        PretrainedError: a token has another id or is missing.
    """
    theirs, ours = (path / "tokenizer.json" for path in (directory, tokenizer_dir))
    if not theirs.exists():
        return
    trained, used = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (theirs, ours))
    trained = {token: number for token, number in trained.items() if not token.startswith("|<EXTRA_TOKENS")}
    other = [
        f"token {token!r} has id {number} and had id {trained[token]} in training"
        for token, number in used.items()
        if trained.get(token, number) != number
    ]
    other += [
        f"token {token!r} had id {number} in training and is missing from this tokenizer"
        for token, number in trained.items()
        if token not in used
    ]
    if other:
        raise PretrainedError(
            f"{ours} gives {len(other)} tokens other ids than {theirs}, with which the weights were trained: "
            f"{', '.join(other[:3])}; make the tokenizer from that one (base vocabulary {vocab_size} + Molmo2's tokens)"
        )


def _new_weights(config: ModelConfig, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Random weights of what no base model has: the connector and the added embedding rows."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Callable[[], Tensor]] = {}
    for name, shape in _shapes(config).items():
        if name.startswith("connector.") or name == "text.embedding.added":
            if name.endswith(".bias"):
                weights[name] = partial(torch.zeros, shape)
            else:
                weights[name] = partial(_draw, shape, generator.get_state())
                _draw_from(generator, shape)  # leaves the generator where the next tensor begins
    return weights


def _draw(shape: torch.Size, state: Tensor) -> Tensor:
    return _draw_from(torch.Generator().set_state(state), shape)


def _draw_from(generator: torch.Generator, shape: torch.Size) -> Tensor:
    return torch.empty(shape).normal_(0, STD, generator=generator)


def _text_weights(directory: Path, config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    """Weights of decoder, base embedding and head from Qwen3 or Olmo-3; a tied head is read as a tensor of its own."""
    text, tied = read_base_text(directory)
    ignored = ["additional_vocab_size", "max_positions"]  # settings of Molmo2, not of the base model
    _refuse_other("llm", directory, [f"text.{line}" for line in config_differences(text, config.text, ignored)])
    shapes = {
        name: shape
        for name, shape in _shapes(config).items()
        if (name.startswith("text.") and name != "text.embedding.added") or (name == "lm_head.weight" and not tied)
    }
    tensors = _used(open_tensors(directory), _TEXT_UNUSED | (_TIED_UNUSED if tied else {}))
    weights = collect(shapes, {_text_name(name, text.norm_after): [name] for name in shapes}, tensors)
    if tied:
        weights["lm_head.weight"] = weights["text.embedding.base"]
    return weights


def _text_name(name: str, norm_after: bool) -> str:
    """The name of our tensor in Qwen3 or, with `norm_after`, in Olmo-3, which names norms after the sublayer before."""
    native = native_name(name)
    assert native is not None
    if norm_after:
        native = native.replace("post_attention_layernorm", "post_feedforward_layernorm")
        native = native.replace("input_layernorm", "post_attention_layernorm")
    return native.replace("model.language_model.", "model.")


def _vision_weights(directory: Path, config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    """Weights of the vision transformer from SigLIP2, up to the last block that is used."""
    vit, image_size, patch_size, num_blocks = read_siglip(directory, config.vit.feature_layers)
    differing = [f"vit.{line}" for line in config_differences(vit, config.vit)]
    # SigLIP2's images may be a little larger than a whole number of patches: 384 = 27 * 14 + 6.
    grids = {"patch_size": (patch_size, config.patch_size)}
    grids["patches on a side"] = (image_size // patch_size, config.crop_size // config.patch_size)
    differing += [f"{name} {found}, wanted {wanted}" for name, (found, wanted) in grids.items() if found != wanted]
    _refuse_other("vit", directory, differing)
    shapes = {name: shape for name, shape in _shapes(config).items() if name.startswith("vit.")}
    unused = _SIGLIP_UNUSED | _deeper_blocks(r"vision_model\.encoder\.layers", config, num_blocks)
    stored = open_tensors(directory)
    if not any(name.startswith("vision_model.") for name in stored):  # saved alone by transformers 5
        stored = {f"vision_model.{name}": tensor for name, tensor in stored.items()}
    tensors: dict[str, Rows] = dict(_used(stored, unused))
    patches = "vision_model.embeddings.patch_embedding.weight"
    if patches in tensors:
        tensors[patches] = _flat_patches(stored[patches])
    return collect(shapes, {_vision_name(name): [name] for name in shapes}, tensors)


def _vision_name(name: str) -> str:
    native = native_name(name)
    assert native is not None
    for old, new in (
        ("model.vision_tower.", "vision_model."),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("patch_embedding.", "embeddings.patch_embedding."),
        (".layers.", ".encoder.layers."),
        (".o_proj.", ".out_proj."),
    ):
        native = native.replace(old, new)
    return native


def _flat_patches(kernel: StoredTensor) -> Rows:
    """Reshape a convolution kernel [out, channels, rows, columns] to a matrix over pixels, channels last."""
    if len(kernel.shape) != 4:
        return kernel
    shape = (kernel.shape[0], math.prod(kernel.shape[1:]))
    return _Derived(shape, lambda rows: kernel[rows].permute(0, 2, 3, 1).flatten(1))


__all__ = ["PretrainedError", "WeightsError", "check_tokenizer", "first_weights", "load_released", "locate"]
