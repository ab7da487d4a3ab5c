"""Export: a training checkpoint becomes a directory that transformers loads offline, without remote code.

Weights and `config.json` have the released ("hub") layout. Before the directory gets its name, transformers reloads
it and must give our tokens and logits; otherwise nothing is left behind. Uploading is not here.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molmo2 import hub
from molmo2.model.config import ModelConfig
from molmo2.model.generate import PromptTensors
from molmo2.model.mask import TRUNK
from molmo2.model.molmo2 import Molmo2
from molmo2.processing import Processor, Tokenizer
from molmo2.processing.processor import visual_layout
from shards.schema import Example, ImageRef, Limits, Source, Text

MARK = "export.json"  # where the weights come from and what the check measured; marks a directory as an export
MAX_CROPS = 8  # tiles of an image's canvas, as in training
NUM_FRAMES = 384
FPS = 2
TOLERANCE = 1e-4  # of logits, float32
TEMPLATE = Path(__file__).parent / "processing" / "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class ExportError(ValueError):
    """An export that cannot be made, or that transformers does not read as we mean it."""


def export_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer_dir: str | Path,
    out: Path,
    origin: dict[str, Any],
) -> dict[str, float]:
    """Write `out`, whole or not at all; an earlier export there is replaced.

    Args:
        config: the model.
        weights: float32, by our names.
        tokenizer_dir: the tokenizer that the model was trained with.
        out: the directory to make.
        origin: JSON, where the weights come from; for the model card and `export.json`.

    Returns:
        The largest difference of logits to transformers, by kind of prompt.

    Raises:
        ExportError: `out` holds something else, or the check failed.
        TokenizerError: the tokenizer is missing or does not fit the model.
    """
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is no earlier export; choose another directory or remove it")
    tokenizer = Tokenizer(tokenizer_dir, config.text.vocab_size)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_files(config, weights, tokenizer, temporary)
        differences = check(temporary, config, weights, tokenizer)
        report = {"origin": origin, "largest_logit_difference": differences}
        write_json(temporary / MARK, report)
        (temporary / "README.md").write_text(model_card(config, origin, differences))
        replace_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return differences


def write_files(config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Everything that transformers reads."""
    hub.write_hub(weights, directory)
    write_json(directory / "config.json", hub.hub_config(config))
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    write_json(directory / "generation_config.json", ids)
    write_json(directory / "processor_config.json", processor_config(config))
    shutil.copyfile(TEMPLATE, directory / "chat_template.jinja")
    for name in TOKENIZER_FILES:
        if (tokenizer.directory / name).exists():
            shutil.copyfile(tokenizer.directory / name, directory / name)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def replace_directory(new: Path, old: Path) -> None:
    """Give `new` the name `old`; what bore it is removed afterwards."""
    doomed = old.with_name(f".old-{old.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if old.exists():
        os.replace(old, doomed)
    os.replace(new, old)
    shutil.rmtree(doomed, ignore_errors=True)


def processor_config(config: ModelConfig) -> dict[str, Any]:
    """`processor_config.json` with both media processors inside, every flag named: defaults differ between them."""
    pixels = {
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
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": True,
        "image_processor": {
            "image_processor_type": "Molmo2ImageProcessor",
            "max_crops": MAX_CROPS,
            "overlap_margins": [config.overlap_margin] * 2,
            "pooling_size": [config.image_pool] * 2,
            **pixels,
        },
        "video_processor": {
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


def check(
    directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> dict[str, float]:
    """Reload with transformers and compare tokens and logits of a text and an image prompt.

    Raises:
        ExportError: tokens differ, or logits by more than `TOLERANCE`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    preprocess = AutoProcessor.from_pretrained(directory, local_files_only=True)
    ours = Molmo2.with_weights(config, weights).eval()
    processor = Processor(visual_layout(config), tokenizer, "eval", num_variants=1)
    size = (2 * config.crop_size, 3 * config.crop_size, 3)
    picture = np.random.Generator(np.random.Philox(0)).integers(0, 256, size, np.uint8)
    differences = {}
    for kind, pictures in (("text", []), ("image", [picture])):
        prompt = ask(processor, "What is this?", pictures, config.text.max_positions)
        inputs = their_inputs(preprocess, "What is this?", pictures)
        if inputs["input_ids"][0].tolist() != prompt.input_ids.tolist():
            raise ExportError(
                f"{directory}: transformers' processor gives other tokens for the {kind} prompt than ours"
            )
        with torch.no_grad():
            differences[kind] = float((all_logits(ours, prompt) - theirs(**inputs).logits).abs().max())
    if not max(differences.values()) <= TOLERANCE:
        raise ExportError(f"{directory}: logits in transformers differ from ours: {differences}, allowed {TOLERANCE}")
    return differences


def all_logits(model: Molmo2, prompt: PromptTensors) -> Tensor:
    """Logits of every position of one prompt, [1, S, vocabulary]."""
    ids = prompt.input_ids[None]
    positions, trunk = torch.arange(ids.shape[1])[None], torch.full_like(ids, TRUNK)
    return model(ids, positions, trunk, prompt.is_visual[None], prompt.pixels, prompt.pooling)


def ask(processor: Processor, question: str, pictures: Sequence[np.ndarray], max_tokens: int) -> PromptTensors:
    """Our model's inputs for a question about images, uint8 [H, W, 3]."""
    files = []
    for rgb in pictures:
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "PNG")
        files.append(ImageRef(data=file.getvalue()))
    example = Example(
        key="question",
        dataset="export",
        source=Source(file="", row=0),
        annotations=(Text(style="user_qa", question=question, answer=""),),
        images=tuple(files),
    )
    crops = len(pictures) * (1 + MAX_CROPS)
    limits = Limits(sequence_length=max_tokens, max_crops=crops, max_images=len(pictures), image_crops=MAX_CROPS)
    return PromptTensors.of(processor.prompt(example, limits))


def their_inputs(preprocess: Any, question: str, pictures: Sequence[np.ndarray]) -> Any:
    """Transformers' inputs for the same."""
    content = [{"type": "image", "image": Image.fromarray(rgb)} for rgb in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    return preprocess.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def model_card(config: ModelConfig, origin: dict[str, Any], differences: Mapping[str, float]) -> str:
    """The exported directory's README."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in origin.items())
    measured = ", ".join(f"{kind} {value:.1e}" for kind, value in differences.items())
    return CARD.format(name=config.name, facts=facts, measured=measured, fps=FPS, frames=NUM_FRAMES)


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [molmo2, nanomolmo2]
---

# A Molmo2 model, preset `{name}`, trained with nanoMolmo2

| | |
|---|---|
{facts}

Float32 weights in the layout of the released Molmo2 checkpoints. When it was written, transformers gave the same
logits as the training code; largest difference: {measured}.

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
content = [{{"type": "image", "url": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Videos: the model was trained on frames at {fps} per second plus the very last one, or {frames} evenly spaced with both
ends when there would be more. Transformers' own sampling leaves out the last frame; to give the model what it knows,
pass the frames and their `frames_indices` yourself, with `do_sample_frames=False`.
"""
