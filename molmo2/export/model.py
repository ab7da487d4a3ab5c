"""Export: it converts a training checkpoint to a directory that transformers loads offline, without remote code.

Weights and `config.json` have the released ("hub") layout. The directory is written under a temporary name and renamed
only if transformers loads it and gives our tokens and logits (`molmo2.export.check`). `molmo2.export.card` renders the
model card; `molmo2.export.upload` uploads the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from molmo2.export.card import NUM_FRAMES, About, model_card
from molmo2.export.check import FPS, MAX_CROPS, ExportError, check
from molmo2.export.remote_code import copy_remote_code, write_vllm_code
from molmo2.export.upload import MARK
from molmo2.model.presets import ModelConfig
from molmo2.processing.tokenizer import TOKENIZER_CONFIG, Tokenizer, tokenizer_config
from molmo2.weights.names import hub_config, write_hub

TEMPLATE = Path(__file__).parents[1] / "processing" / "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def export_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_dir: str | Path,
    out: Path,
    about: About,
    remote_code: Path | None = None,
    *,
    for_vllm: bool = False,
) -> dict[str, float]:
    """Export a model to `out` atomically; an earlier export there is replaced.

    Args:
        config: the model.
        weights: float32, by our names.
        tokenizer_dir: the tokenizer with which the model was trained.
        out: the directory to create.
        about: the origin of the weights, for the model card and `export.json`.
        remote_code: a downloaded release, whose remote code is copied beside the weights.
        for_vllm: put our configuration and processor for vLLM beside the weights; not together with `remote_code`.

    Returns:
        The largest difference of logits to transformers, by kind of prompt.

    Raises:
        ExportError: `out` exists and is not an export, `remote_code` has no usable code, or the check failed.
        TokenizerError: the tokenizer is missing or does not fit the model.
    """
    with new_export(out) as temporary:
        tokenizer = Tokenizer(tokenizer_dir, config.text.vocab_size)
        write_files(config, weights, tokenizer, temporary)
        code = ""
        if for_vllm:
            code = "vllm"
            write_vllm_code(temporary)
        elif remote_code is not None:
            code = "release"
            copy_remote_code(remote_code, temporary)
        differences = check(temporary, config, weights, tokenizer)
        write_mark(temporary, about, differences)
        num_parameters = sum(tensor.numel() for tensor in weights.values())
        card = model_card(config, num_parameters, about, differences, code=code)
        (temporary / "README.md").write_text(card)
    return differences


@contextmanager
def new_export(out: Path) -> Iterator[Path]:
    """Give a directory to write an export into; when the block ends, it becomes `out` and replaces an earlier export.

    Raises:
        ExportError: `out` exists and is not an export.
    """
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an earlier export; choose another directory or remove it")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_mark(directory: Path, about: About, differences: Mapping[str, float]) -> None:
    """Write the file by which an export is recognised: the origin of the weights, and the results of the check."""
    report = {"origin": dict(about.origin), "largest_logit_difference": dict(differences)}
    write_settings(directory / MARK, report)


def write_files(config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Write all files that transformers reads."""
    write_hub(weights, directory)
    written_by = {"transformers_version": version("transformers")}
    write_settings(directory / "config.json", hub_config(config) | written_by)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    write_settings(directory / "generation_config.json", ids | written_by)
    write_processor(config, tokenizer, directory)


def write_processor(config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files of transformers' processor: its settings, the chat template and the tokenizer."""
    for name, settings in processor_configs(config).items():
        write_settings(directory / name, settings)
    shutil.copyfile(TEMPLATE, directory / "chat_template.jinja")
    settings = tokenizer_config(tokenizer.directory) | {"model_max_length": config.text.max_positions}
    write_settings(directory / TOKENIZER_CONFIG, settings)
    for name in TOKENIZER_FILES:
        if (tokenizer.directory / name).exists():
            shutil.copyfile(tokenizer.directory / name, directory / name)


def write_settings(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def replace_directory(new: Path, old: Path) -> None:
    """Rename `new` to `old`; the directory that had this name is removed afterwards."""
    doomed = old.with_name(f".old-{old.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if old.exists():
        os.replace(old, doomed)
    os.replace(new, old)
    shutil.rmtree(doomed, ignore_errors=True)


def processor_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The processor's files, as in a release; every flag is explicit, since defaults differ between engines."""
    pixels = {
        "processor_class": "Molmo2Processor",
        "size": {"height": config.crop_size, "width": config.crop_size},
        "patch_size": config.patch_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
    }
    return {
        "processor_config.json": {
            "processor_class": "Molmo2Processor",
            "image_use_col_tokens": True,
            "use_single_crop_col_tokens": False,
            "use_single_crop_start_token": True,
            "video_use_col_tokens": False,
            "use_frame_special_tokens": True,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Molmo2ImageProcessor",
            "max_crops": MAX_CROPS,
            "overlap_margins": [config.overlap_margin] * 2,
            "pooling_size": [config.image_pool] * 2,
            **pixels,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Molmo2VideoProcessor",
            "frame_sample_mode": "uniform_last_frame",
            "max_fps": FPS,
            "sampling_fps": FPS,
            "num_frames": NUM_FRAMES,
            "pooling_size": [config.video_pool] * 2,
            "do_sample_frames": True,
            **pixels,
        },
    }
