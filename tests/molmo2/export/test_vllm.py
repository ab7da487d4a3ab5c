"""vLLM gives our ids, our answers to texts, and to images and videos the answers of our model with two faults.

The faults are described in docs/upstream.md. `make test-engines` runs it, with vLLM in an environment of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from exports import ABOUT, noisy, weights_of
from processing_cases import example, noise, tokenizer_dir
from tiny_models import OLMO, QWEN, YARN

from molmo2.export.check import QUESTION, CheckedPrompt, our_inputs
from molmo2.export.model import export_model
from molmo2.model.generate import Cache, PromptTensors, generate, prefill
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import ModelConfig
from molmo2.processing.contract import visual_layout
from molmo2.processing.processor import Processor
from molmo2.processing.tokenizer import Tokenizer
from shards.schema import Limits, Text

VLLM = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not VLLM, reason="VLLM_PYTHON names no Python with vLLM; `make test-engines` makes one"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
ANSWERS = Path(__file__).parents[1] / "vllm_answers.py"
NEW_TOKENS = 12
TOLERANCE = 1e-4  # largest accepted difference of a log-probability in float32
IM_PATCH = 2  # the row of `<im_patch>` among the added tokens
# vLLM's attention on CPUs has kernels for heads of 32 and more.
HEADS = {"head_dim": 32, "num_heads": 2, "num_kv_heads": 1}
CONFIGS = {
    name: dataclasses.replace(config, text=dataclasses.replace(config.text, **{**HEADS, **more}))
    for name, config, more in (("qwen3", QWEN, {}), ("olmo", OLMO, {"num_kv_heads": 2}), ("yarn", YARN, {}))
}
TEXTS = [QUESTION, "Gr\u00fc\u00dfe, \u4f60\u597d?", "a <|im_end|> b <im_patch>", "  two\n lines "]
PICTURES = [
    [noise(100, 170)],
    [noise(40, 33)],
    [noise(84, 84, 3)],
    [noise(170, 100, 1), noise(60, 90, 2)],
    [noise(90, 90, 4), noise(90, 91, 5), noise(30, 200, 6)],
]
CLIPS = [1, 2, 5, 9]  # frames


class Asked(NamedTuple):
    """A prompt for both; `visual` says whether it has images or a video."""

    ours: PromptTensors
    theirs: dict[str, Any]
    visual: bool


def prompts(config: ModelConfig, folder: Path) -> list[Asked]:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(tokenizer_dir(), config.text.vocab_size)
    template = AutoTokenizer.from_pretrained(tokenizer_dir())
    template.chat_template = (Path(__file__).parents[3] / "molmo2/processing/chat_template.jinja").read_text()
    processor = Processor(visual_layout(config), tokenizer, "eval", num_variants=1)
    limits = Limits(sequence_length=2048, max_crops=64)

    def saved(pixels: Any) -> str:
        file = folder / f"{len(list(folder.iterdir()))}.npy"
        np.save(file, pixels)
        return str(file)

    def theirs(question: str, kinds: list[str], **media: Any) -> dict[str, Any]:
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        text = template.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return {"text": text, "question": question, "images": [], "frames": None, "sampled": False, **media}

    asked = []
    for text in TEXTS:
        prompt = processor.prompt(example(Text(style="user_qa", question=text, answer="")), limits)
        asked.append(Asked(PromptTensors.of(prompt), theirs(text, []), visual=False))
    for pictures in PICTURES:
        ours = our_inputs(config, tokenizer, CheckedPrompt(pictures=pictures))
        files = [saved(rgb) for rgb in pictures]
        asked.append(Asked(ours, theirs(QUESTION, ["image"] * len(files), images=files), visual=True))
    for count, sampled in itertools.product(CLIPS, (False, True)):
        frames = np.stack([noise(50, 70, seed) for seed in range(count)])
        ours = our_inputs(config, tokenizer, CheckedPrompt(frames=frames))
        asked.append(Asked(ours, theirs(QUESTION, ["video"], frames=saved(frames), sampled=sampled), visual=True))
    return asked


class Answers(NamedTuple):
    """What both sides were asked and what vLLM said."""

    model: Molmo2
    asked: list[Asked]
    vllm: list[dict[str, Any]]


@pytest.fixture(scope="module", params=CONFIGS)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Export a model and ask vLLM all prompts."""
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp("vllm")
    model = noisy(config)
    export_model(config, weights_of(model), tokenizer_dir(), folder / "export", ABOUT, for_vllm=True)
    (folder / "media").mkdir()
    asked = prompts(config, folder / "media")
    (folder / "prompts.json").write_text(json.dumps([prompt.theirs for prompt in asked]))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "VLLM_CACHE_ROOT": str(folder / "cache")}
    command = [VLLM, ANSWERS, folder / "export", folder / "prompts.json", folder / "answers.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return Answers(model, asked, json.loads((folder / "answers.json").read_text()))


def test_every_prompt_has_our_ids(answers: Answers) -> None:
    for asked, theirs in zip(answers.asked, answers.vllm, strict=True):
        assert theirs["prompt"] == asked.ours.input_ids.tolist()
        assert theirs["chat"] == (None if asked.theirs["frames"] else theirs["prompt"])


def largest_difference(model: Molmo2, prompt: PromptTensors, theirs: dict[str, Any]) -> float:
    """The largest difference of the first token's log-probabilities, over the tokens that vLLM lists."""
    with torch.no_grad():
        ours = model.lm_head(prefill(model, [prompt], Cache())[0][:, -1])[0].log_softmax(-1)
    return max(abs(value - float(ours[int(token)])) for token, value in theirs["logprobs"].items())


def faulty(model: Molmo2) -> Molmo2:
    """A model that replaces the embedding of `<im_patch>` by the features, as vLLM does; ours adds to it."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.text.embedding.added[IM_PATCH] = 0
    return changed


def causal(prompt: PromptTensors) -> PromptTensors:
    """A prompt whose visual tokens do not see later ones, as in vLLM's attention on CPUs."""
    return dataclasses.replace(prompt, is_visual=torch.zeros_like(prompt.is_visual))


def test_texts_have_our_answers(answers: Answers) -> None:
    eos = Tokenizer(tokenizer_dir(), 320).eos
    pairs = [pair for pair in zip(answers.asked, answers.vllm, strict=True) if not pair[0].visual]
    assert len(pairs) == len(TEXTS)
    for asked, theirs in pairs:
        assert generate(answers.model, [asked.ours], NEW_TOKENS, eos)[0] == until(eos, theirs["answer"])
        assert largest_difference(answers.model, asked.ours, theirs) < TOLERANCE


def until(eos: int, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_images_and_videos_have_the_answers_of_our_model_with_both_faults(answers: Answers) -> None:
    """A model with one fault or none differs; if it does not, vLLM was mended and docs/upstream.md is out of date."""
    eos = Tokenizer(tokenizer_dir(), 320).eos
    changed = faulty(answers.model)
    pairs = [pair for pair in zip(answers.asked, answers.vllm, strict=True) if pair[0].visual]
    assert len(pairs) == len(PICTURES) + 2 * len(CLIPS)
    for asked, theirs in pairs:
        assert generate(changed, [causal(asked.ours)], NEW_TOKENS, eos)[0] == until(eos, theirs["answer"])
        assert largest_difference(changed, causal(asked.ours), theirs) < TOLERANCE
        assert largest_difference(answers.model, asked.ours, theirs) > 100 * TOLERANCE, "vLLM was mended"
        assert largest_difference(changed, asked.ours, theirs) > 100 * TOLERANCE
        assert largest_difference(answers.model, causal(asked.ours), theirs) > 100 * TOLERANCE
