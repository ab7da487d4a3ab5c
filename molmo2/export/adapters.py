"""Export of what a LoRA run has trained, in peft's format, to be added to the model from which the run began.

The file holds the adapters of the language model, and what was trained beside them: the rows of the added tokens, the
connector and the vision transformer, unless the recipe froze them. Plain peft loads it on transformers' Molmo2, whose
layers are not fused, so that each adapter of ours is one of theirs. The export is compared with the training code as a
whole model is (`molmo2.export.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from molmo2.checkpoint.consolidate import open_states
from molmo2.checkpoint.files import RECIPE, STATES, Checkpoint
from molmo2.config import data_path
from molmo2.export.card import About
from molmo2.export.check import ExportError, compare
from molmo2.export.model import new_export, write_mark, write_processor
from molmo2.model.lora import A, B, merged
from molmo2.model.presets import ModelConfig, config_differences
from molmo2.pages import fill_template
from molmo2.processing.tokenizer import Tokenizer
from molmo2.weights.config_json import read_molmo2
from molmo2.weights.names import native_name
from molmo2.weights.pretrained import locate

LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"  # those of `model.lora`
PREFIX = "base_model.model."  # begins the names in peft's files
ADDED = "text.embedding.added"
ADDED_ROWS = f"{PREFIX}model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"


class Beside(NamedTuple):
    """A component that trains beside the adapters: its module in transformers, and its name in a text."""

    module: str
    text: str


BESIDE = {
    "vit": Beside("vision_tower", "the vision transformer"),
    "connector": Beside("multi_modal_projector", "the connector and the embeddings of the added tokens"),
}


def export_adapters(checkpoint: Checkpoint, base: str, out: Path, about: About) -> dict[str, float]:
    """Export what a LoRA run has trained to `out` atomically; an earlier export there is replaced.

    Args:
        checkpoint: a checkpoint of the run.
        base: the model from which the run began: a directory, or OWNER/NAME or OWNER/NAME@REVISION on the hub.
        out: the directory to create.
        about: the origin of the weights.

    Returns:
        The largest difference of logits between base with adapters and the merged model, by kind of prompt.

    Raises:
        ExportError: the run did not train adapters, `base` is another model, `out` exists and is not an export, or the
            check failed.
        PretrainedError, ForeignConfigError: `base` cannot be found, or is another kind of model.
    """
    config, recipe = checkpoint.model_config, checkpoint.read(RECIPE)
    lora, train = recipe["optim"].get("lora"), recipe["train"]
    if lora is None:
        raise ExportError(f"{checkpoint.path}: trained without optim.lora; export it whole, without --adapters-for")
    directory = locate(base)
    if differing := config_differences(read_molmo2(directory), config, ["text.max_positions"]):
        raise ExportError(f"{base} is not the model from which the run began: {'; '.join(differing)}")
    on_hub = directory not in (Path(base), data_path(base))
    name, _, revision = base.partition("@") if on_hub else (str(directory.resolve()), "", "")
    weights = open_states(checkpoint.path / STATES)
    trained = [component for component in BESIDE if component not in train["freeze"]]
    dtype = "bfloat16" if train["precision"] == "bf16" else "float32"
    with new_export(out) as temporary:
        save_file(adapter_tensors(weights, trained), temporary / "adapter_model.safetensors", {"format": "pt"})
        settings = peft_config(config, lora, trained)
        settings.base_model_name_or_path, settings.revision = name, revision or None
        settings.save_pretrained(temporary)
        tokenizer = Tokenizer(data_path(recipe["tokenizer"]), config.text.vocab_size)
        write_processor(config, tokenizer, temporary)
        whole = {ours: read() for ours, read in merged(weights, recipe).items()}
        try:
            differences = compare(temporary, load(directory, temporary, dtype), config, whole, tokenizer)
        except ExportError as error:
            raise ExportError(f"{error}; is {base} the model from which the run began?") from None
        write_mark(temporary, about, differences)
        card = fill_template(
            "export/adapter_card.md.jinja",
            base=name,
            on_hub=on_hub,
            revision=revision,
            dtype=dtype,
            lora=lora,
            beside=[BESIDE[component].text for component in trained],
            origin=about.origin,
            differences=differences,
        )
        (temporary / "README.md").write_text(card)
    return differences


def adapter_tensors(weights: Mapping[str, Callable[[], Tensor]], trained: list[str]) -> dict[str, Tensor]:
    """The trained tensors by their names in peft's file; `trained` are the components beside the language model."""
    tensors = {}
    for name, read in weights.items():
        for end, theirs in ((A, "lora_A.weight"), (B, "lora_B.weight")):
            if name.endswith(end):
                layer = native_name(name.removesuffix(end) + ".weight")
                assert layer is not None
                tensors[f"{PREFIX}{layer.removesuffix('weight')}{theirs}"] = read().contiguous()
        if name.partition(".")[0] in trained:
            tensors[f"{PREFIX}{native_name(name)}"] = read().contiguous()
    if "connector" in trained:  # the component to which they belong
        tensors[ADDED_ROWS] = weights[ADDED]().contiguous()
    return tensors


def peft_config(config: ModelConfig, lora: Mapping[str, Any], trained: list[str]) -> Any:
    """Peft's configuration for the tensors of `adapter_tensors`."""
    from peft import LoraConfig  # an optional dependency

    first = config.text.vocab_size
    rows = {"embed_tokens": list(range(first, first + config.text.additional_vocab_size))}
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=LAYERS,
        modules_to_save=[BESIDE[component].module for component in trained] or None,
        trainable_token_indices=rows if "connector" in trained else None,
        inference_mode=True,
    )


def load(base: Path, adapters: Path, dtype: str) -> Any:
    """Transformers' float32 model with the adapters, the base weights rounded to the precision of training."""
    from peft import PeftModel
    from transformers import Molmo2ForConditionalGeneration

    options = {"local_files_only": True, "trust_remote_code": False}
    model = Molmo2ForConditionalGeneration.from_pretrained(base, dtype=getattr(torch, dtype), **options)
    return PeftModel.from_pretrained(model.float(), str(adapters))
