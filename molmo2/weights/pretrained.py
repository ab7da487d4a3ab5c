"""First weights that others have made: base models to begin from, and whole Molmo2 models to go on with or to use.

`first_weights` serves the trainer, `load_released` whoever has a released or exported directory instead of a run.
Every tensor of a checkpoint is either used or stands in a list of those that are left out, with the reason; anything
else is an error. Tensors are read one at a time, so a model is held once. Names of Molmo2's own tensors are in
`molmo2.weights.names`, `config.json` is read in `molmo2.weights.config_json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
from molmo2.model.presets import ModelConfig, differences
from molmo2.weights.config_json import read_base_text, read_molmo2, read_siglip
from molmo2.weights.names import Stored, WeightsError, collect, from_foreign, native_name, open_tensors

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # weights, configuration, tokenizer, processor
STD = 0.02  # of connector and added embedding rows where the rest is pretrained
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

# Tensors that are deliberately left out, and why.
_SIGLIP_UNUSED = {
    r"text_model\..*": "Molmo2 has a language model of its own",
    r"logit_(scale|bias)": "parts of SigLIP's loss",
    r"vision_model\.head\..*": "pools one vector from an image; Molmo2 pools windows of patches",
    r"vision_model\.post_layernorm\..*": "behind the last block; Molmo2 takes the features of blocks as they are",
    r"vision_model\.embeddings\.position_ids": "a buffer of older files: 0, 1, 2, ...",
}
_TEXT_UNUSED = {r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq": "a buffer of older files, computed here"}
_TIED_UNUSED = {r"lm_head\.weight": "the head is tied: the embedding table once more"}


class PretrainedError(ValueError):
    """Weights that cannot be found or fetched, or that belong to another model than the recipe's."""


# --- finding ---------------------------------------------------------------------------------------------------------


def locate(name: str | Path) -> Path:
    """The directory of a model: itself, below `MOLMO2_DATA`, or fetched from the hub by OWNER/NAME[@REVISION].

    What has been fetched stays in the cache of `huggingface_hub`, in a directory named after the commit.

    Raises:
        PretrainedError: there is no such directory or repository, or the hub does not give it out.
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
        # No folders: some repositories keep the same weights in other formats there.
        found = snapshot_download(repo, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"])
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
        return Path(found)
    raise PretrainedError(f"{repo} {reason}")


# --- whole models ----------------------------------------------------------------------------------------------------


def load_released(name: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A Molmo2 that is a directory or repository with `config.json`: released, exported here, or saved by transformers.

    Returns:
        Its configuration, and its float32 weights by our names.

    Raises:
        PretrainedError: it cannot be found.
        ForeignConfigError: it is another kind of model.
        WeightsError: tensors are missing, unexpected, damaged or of another shape.
    """
    directory = locate(name)
    config = read_molmo2(directory)
    return config, _released_weights(directory, config)


def _released_weights(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    blocks = r"model\.(vision_backbone\.image_vit\.transformer\.resblocks|vision_tower\.layers)"
    tensors = _used(open_tensors(directory), _deeper_blocks(blocks, config))
    return from_foreign(_shapes(config), _joined_embedding(tensors, config.text.vocab_size))


def _deeper_blocks(prefix: str, config: ModelConfig, count: int = 64) -> dict[str, str]:
    """Vision blocks that are left out, of `count`."""
    reason = "behind the last block whose features are used"
    return {rf"{prefix}\.{number}\..*": reason for number in range(config.vit.num_layers, count)}


def _joined_embedding(tensors: Mapping[str, Stored], rows: int) -> Mapping[str, Callable[[], Tensor]]:
    """Repair the embedding as transformers 5 saves it: one table cut into two halves instead of base and added rows."""
    names = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
    if not all(name in tensors for name in names):
        return tensors
    base, added = (tensors[name] for name in names)
    if base.shape != added.shape or base.shape[0] >= rows:
        return tensors
    cuts = (slice(rows), slice(rows, None))
    return {**tensors, **{name: partial(_cut, base, added, cut) for name, cut in zip(names, cuts, strict=True)}}


def _cut(base: Stored, added: Stored, rows: slice) -> Tensor:
    return torch.cat([base(), added()])[rows].clone()


def _used(tensors: Mapping[str, Stored], unused: Mapping[str, str]) -> dict[str, Stored]:
    """Tensors without those that are deliberately left out."""
    pattern = re.compile("|".join(unused) or "(?!)")
    return {name: tensor for name, tensor in tensors.items() if not pattern.fullmatch(name)}


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Molmo2(config).state_dict().items()}


# --- first weights of a run ------------------------------------------------------------------------------------------


def first_weights(
    init: FirstWeights, config: ModelConfig, tokenizer_dir: Path, seed: int, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """Float32 weights by our names for a run that starts from other people's.

    Args:
        init: where they come from.
        config: the recipe's model.
        tokenizer_dir: the recipe's tokenizer; it must give text the ids that the weights know.
        seed: of what is drawn.
        say: is told which directory, so which commit, was read.

    Raises:
        PretrainedError: they cannot be found, or belong to another model or tokenizer.
        ForeignConfigError: a checkpoint is another kind of model.
        WeightsError: tensors are missing, unexpected, damaged or of another shape.
    """
    found = {key: locate(name) for key, name in init.model_dump().items() if name is not None}
    for key, directory in found.items():
        say(f"init.{key}: {getattr(init, key)}, read from {directory}")
    if init.molmo2:
        directory = found["molmo2"]
        # The number of positions has no weights; it may be chosen anew.
        _refuse_other("molmo2", directory, differences(read_molmo2(directory), config, ["text.max_positions"]))
        check_tokenizer(directory, tokenizer_dir, config.text.vocab_size)
        return _released_weights(directory, config)
    weights = _new_weights(config, seed)
    weights |= _text_weights(found["llm"], config)
    weights |= _vision_weights(found["vit"], config)
    check_tokenizer(found["llm"], tokenizer_dir, config.text.vocab_size)
    return weights


def _refuse_other(key: str, directory: Path, differing: list[str]) -> None:
    if differing:
        raise PretrainedError(
            f"init.{key}: {directory} is another model than the recipe's `model`: {'; '.join(differing)}; "
            "name the checkpoint that belongs to the preset, or another preset"
        )


def check_tokenizer(directory: Path, tokenizer_dir: Path, vocab_size: int) -> None:
    """Compare the tokenizer beside some weights, if there is one, with the tokenizer that is to be used.

    The base table may have more rows than its tokenizer has entries, never fewer; `write_tokenizer` fills the gap, and
    only what fills it may be called otherwise.

    Raises:
        PretrainedError: a token has another id, or none.
    """
    theirs, ours = (path / "tokenizer.json" for path in (directory, tokenizer_dir))
    if not theirs.exists():
        return
    trained, used = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (theirs, ours))
    trained = {token: number for token, number in trained.items() if not token.startswith("|<EXTRA_TOKENS")}
    other = [
        f"{token!r} is {number}, was {trained[token]}"
        for token, number in used.items()
        if trained.get(token, number) != number
    ]
    other += [f"{token!r} is none, was {number}" for token, number in trained.items() if token not in used]
    if other:
        raise PretrainedError(
            f"{ours} gives {len(other)} tokens other ids than {theirs}, with which the weights were trained: "
            f"{', '.join(other[:3])}; make the tokenizer from that one (base vocabulary {vocab_size} + Molmo2's tokens)"
        )


def _new_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """What no base model has: connector and added embedding rows. Equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.zeros(shape) if name.endswith(".bias") else torch.empty(shape).normal_(0, STD, generator=generator)
        for name, shape in _shapes(config).items()
        if name.startswith("connector.") or name == "text.embedding.added"
    }


def _text_weights(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Decoder, base embedding and head of Qwen3 or Olmo-3; a tied head becomes a tensor of its own."""
    text, tied = read_base_text(directory)
    ignored = ["additional_vocab_size", "max_positions"]  # Molmo2's own
    _refuse_other("llm", directory, [f"text.{line}" for line in differences(text, config.text, ignored)])
    shapes = {
        name: shape
        for name, shape in _shapes(config).items()
        if (name.startswith("text.") and name != "text.embedding.added") or (name == "lm_head.weight" and not tied)
    }
    tensors = _used(open_tensors(directory), _TEXT_UNUSED | (_TIED_UNUSED if tied else {}))
    weights = collect(shapes, {_text_name(name, text.norm_after): [name] for name in shapes}, tensors)
    if tied:
        weights["lm_head.weight"] = weights["text.embedding.base"].clone()
    return weights


def _text_name(name: str, norm_after: bool) -> str:
    """The name in Qwen3, or with `norm_after` in Olmo-3, which calls its norms after what they follow."""
    native = native_name(name)
    assert native is not None
    if norm_after:
        native = native.replace("post_attention_layernorm", "post_feedforward_layernorm")
        native = native.replace("input_layernorm", "post_attention_layernorm")
    return native.replace("model.language_model.", "model.")


def _vision_weights(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The vision tower of SigLIP2, down to the last block that is used."""
    vit, image_size, patch_size, num_blocks = read_siglip(directory, config.vit.feature_layers)
    differing = [f"vit.{line}" for line in differences(vit, config.vit)]
    # SigLIP2's images may be a little larger than a whole number of patches: 384 = 27 * 14 + 6.
    grids = {"patch_size": (patch_size, config.patch_size)}
    grids["patches on a side"] = (image_size // patch_size, config.crop_size // config.patch_size)
    differing += [f"{name} {found}, wanted {wanted}" for name, (found, wanted) in grids.items() if found != wanted]
    _refuse_other("vit", directory, differing)
    shapes = {name: shape for name, shape in _shapes(config).items() if name.startswith("vit.")}
    unused = _SIGLIP_UNUSED | _deeper_blocks(r"vision_model\.encoder\.layers", config, num_blocks)
    stored = open_tensors(directory)
    if not any(name.startswith("vision_model.") for name in stored):  # transformers 5 saves a bare tower so
        stored = {f"vision_model.{name}": tensor for name, tensor in stored.items()}
    tensors: dict[str, Callable[[], Tensor]] = dict(_used(stored, unused))
    patches = "vision_model.embeddings.patch_embedding.weight"
    if patches in tensors:
        tensors[patches] = lambda: _flat_patches(stored[patches]())
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


def _flat_patches(kernel: Tensor) -> Tensor:
    """A convolution's kernel [out, channels, rows, columns] as a matrix over pixels, channels last."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


__all__ = ["PretrainedError", "WeightsError", "check_tokenizer", "first_weights", "load_released", "locate"]
