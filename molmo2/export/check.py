"""The check of an export: transformers loads the directory and must give our tokens and our logits.

The prompts are a text, one image, two images and a video. No answers are generated.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from molmo2.model.generate import PromptTensors
from molmo2.model.mask import TRUNK
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig
from molmo2.processing.chat_format import assemble, encode_user
from molmo2.processing.contract import visual_layout
from molmo2.processing.frames import timestamp
from molmo2.processing.processor import Processor
from molmo2.processing.tiling import view
from molmo2.processing.tokenizer import Tokenizer
from shards import layout as geometry
from shards.schema import Example, ImageRef, Limits, Source, Text

MAX_CROPS = 8  # maximum tiles of an image's canvas, as in training
FPS = 2  # frames per second of a video
TOLERANCE = 1e-4  # largest accepted absolute difference of float32 logits
QUESTION = "What is this?"

Pixels = npt.NDArray[np.uint8]


class ExportError(ValueError):
    """An export cannot be made, or transformers does not give our tokens and logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPrompt:
    """The visuals of a question: images uint8 [H, W, 3], or a video's frames uint8 [N, H, W, 3] at `FPS`, or none."""

    pictures: Sequence[Pixels] = ()
    frames: Pixels | None = None


def questions(crop_size: int) -> dict[str, CheckedPrompt]:
    """A question of every kind, with small visuals of noise; two images differ in shape, so that a swap is detected."""
    rng = np.random.Generator(np.random.Philox(0))

    def noise(*shape: int) -> Pixels:
        return rng.integers(0, 256, (*shape, 3), np.uint8)

    wide, tall = noise(2 * crop_size, 3 * crop_size), noise(crop_size + 9, crop_size // 2)
    return {
        "text": CheckedPrompt(),
        "image": CheckedPrompt(pictures=[wide]),
        "two images": CheckedPrompt(pictures=[tall, wide]),
        "video": CheckedPrompt(frames=noise(3, crop_size // 2, crop_size)),
    }


def check(
    directory: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> dict[str, float]:
    """Load a directory with transformers, from disk only and without remote code, and compare tokens and logits.

    Returns:
        The largest absolute difference of logits, by kind of prompt.

    Raises:
        ExportError: tokens differ, or logits differ by more than `TOLERANCE`.
    """
    from transformers import AutoModelForImageTextToText

    options = {"local_files_only": True, "trust_remote_code": False}
    theirs = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, **options)
    return compare(directory, theirs, config, weights, tokenizer)


def compare(
    directory: Path, theirs: Any, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> dict[str, float]:
    """As `check`, with a float32 model that transformers has loaded; the processor is that of `directory`."""
    from transformers import AutoProcessor

    preprocess = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    ours = Molmo2.with_weights(config, weights).eval()
    theirs.eval()
    differences = {}
    for kind, asked in questions(config.crop_size).items():
        prompt = our_inputs(config, tokenizer, asked)
        inputs = their_inputs(preprocess, asked)
        if inputs["input_ids"][0].tolist() != prompt.input_ids.tolist():
            raise ExportError(
                f"{directory}: transformers' processor gives other tokens for the {kind} prompt than ours; "
                "is the installed transformers one that setup.cfg allows?"
            )
        with torch.no_grad():
            differences[kind] = float((all_logits(ours, prompt) - theirs(**inputs).logits).abs().max())
    # `not <=` instead of `>`, so that NaN is refused too.
    refused = {kind: value for kind, value in differences.items() if not value <= TOLERANCE}
    if refused:
        raise ExportError(f"{directory}: logits in transformers differ from ours: {refused}, allowed {TOLERANCE}")
    return differences


def all_logits(model: Molmo2, prompt: PromptTensors) -> Tensor:
    """Logits of every position of one prompt, [1, S, vocabulary]."""
    ids = prompt.input_ids[None]
    positions, trunk = torch.arange(ids.shape[1])[None], torch.full_like(ids, TRUNK)
    return model(ids, positions, trunk, prompt.is_visual[None], prompt.pixels, prompt.pooling)


def our_inputs(config: ModelConfig, tokenizer: Tokenizer, asked: CheckedPrompt) -> PromptTensors:
    """The inputs of our model for `QUESTION`, from our processor."""
    if asked.frames is not None:
        return _frame_inputs(config, tokenizer, asked.frames)
    files = []
    for rgb in asked.pictures:
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "PNG")
        files.append(ImageRef(data=file.getvalue()))
    example = Example(
        key="question",
        dataset="export",
        source=Source(file="", row=0),
        annotations=(Text(style="user_qa", question=QUESTION, answer=""),),
        images=tuple(files),
    )
    limits = Limits(
        sequence_length=config.text.max_positions,
        max_crops=len(files) * (1 + MAX_CROPS),
        max_images=len(files),
        image_crops=MAX_CROPS,
    )
    processor = Processor(visual_layout(config), tokenizer, "eval", num_variants=1)
    return PromptTensors.of(processor.prompt(example, limits))


def _frame_inputs(config: ModelConfig, tokenizer: Tokenizer, frames: Pixels) -> PromptTensors:
    """The inputs of a video as the processor makes them from decoded frames, so that both models get equal pixels."""
    layout = visual_layout(config)
    visuals = [{"kind": "frame", "time": i / FPS} for i in range(len(frames))]
    trunk = [tokenizer.bos]
    for i in range(len(frames)):
        trunk += [*tokenizer.encode(timestamp(i, i / FPS)), layout.tokens.video]
    stored = assemble([*trunk, *encode_user(tokenizer, QUESTION)], [], None)
    expanded = geometry.expand(layout, stored, visuals)
    pooling = [geometry.visual_pooling(layout, visual) + i * layout.crop_patches**2 for i, visual in enumerate(visuals)]
    return PromptTensors(
        input_ids=torch.from_numpy(expanded.input_ids).long(),
        is_visual=torch.from_numpy(expanded.is_visual),
        pixels=torch.from_numpy(view(layout, frames)),
        pooling=torch.from_numpy(np.concatenate(pooling)),
    )


def their_inputs(preprocess: Any, asked: CheckedPrompt) -> Any:
    """The inputs from transformers' processor; it gets the frames themselves, since its sampling is not Molmo2's."""
    from transformers.video_utils import VideoMetadata

    content: list[dict[str, Any]] = [{"type": "image"} for _ in asked.pictures]
    media: dict[str, Any] = {"images": [Image.fromarray(rgb) for rgb in asked.pictures]} if asked.pictures else {}
    if asked.frames is not None:
        count = len(asked.frames)
        content = [{"type": "video"}]
        facts = VideoMetadata(total_num_frames=count, fps=float(FPS), frames_indices=list(range(count)))
        media = {"videos": [asked.frames], "video_metadata": [facts], "do_sample_frames": False}
    message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
    text = preprocess.apply_chat_template([message], add_generation_prompt=True)
    return preprocess(text=text, return_tensors="pt", **media)
