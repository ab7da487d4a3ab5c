"""Export: what transformers reloads offline is our model, to the token."""

from __future__ import annotations

import dataclasses
import json
import resource
import socket
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from exports import ABOUT, ORIGIN, exported, noisy, reload, run_tool, weights_of, write_checkpoint
from PIL import Image
from processing_cases import noise, tokenizer_dir
from safetensors import safe_open
from tiny_models import OLMO, QWEN, YARN, reference_config

from molmo2.checkpoint.files import MODEL
from molmo2.export import model as export
from molmo2.export.check import QUESTION, TOLERANCE, CheckedPrompt, ExportError, our_inputs, their_inputs
from molmo2.model.decoder import rope_frequencies
from molmo2.model.generate import PromptTensors, generate
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS, ModelConfig
from molmo2.processing.tokenizer import Tokenizer, TokenizerError
from molmo2.weights import names as hub

NEW_TOKENS = 12


def our_answers(model: Molmo2, prompts: list[PromptTensors]) -> list[list[int]]:
    return generate(model, prompts, NEW_TOKENS, Tokenizer(tokenizer_dir(), model.config.text.vocab_size).eos)


def their_answer(theirs: Any, inputs: Any) -> list[int]:
    output = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    answer = output[inputs["input_ids"].shape[1] :].tolist()
    eos = theirs.generation_config.eos_token_id
    return answer[: answer.index(eos)] if eos in answer else answer


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def asked_things() -> dict[str, CheckedPrompt]:
    """Other sizes than those of the export check."""
    return {
        "text": CheckedPrompt(),
        "image": CheckedPrompt(pictures=[noise(100, 170)]),
        "two images": CheckedPrompt(pictures=[noise(170, 100, 1), noise(60, 90, 2)]),
        "video": CheckedPrompt(frames=np.stack([noise(50, 70, seed) for seed in range(5)])),
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", [QWEN, OLMO, YARN], ids=["qwen3", "olmo", "yarn"])
def test_transformers_generates_our_tokens(config: ModelConfig, tmp_path: Path, no_network: None) -> None:
    """Loaded as a user does: neither network nor remote code."""
    model = noisy(config)
    theirs, preprocess = reload(exported(model, tmp_path / "out"))
    tokenizer = Tokenizer(tokenizer_dir(), 320)
    prompts = [our_inputs(config, tokenizer, asked) for asked in asked_things().values()]
    inputs = [their_inputs(preprocess, asked) for asked in asked_things().values()]
    for prompt, row in zip(prompts, inputs, strict=True):
        assert prompt.input_ids.tolist() == row["input_ids"][0].tolist()
    answers = our_answers(model, prompts)  # one batch of four lengths
    assert len({tuple(answer) for answer in answers}) == 4
    assert answers == [their_answer(theirs, row) for row in inputs]


def test_the_template_takes_media_inside_messages(tmp_path: Path) -> None:
    """The way of the model card, in one call, gives the tokens of the way in two."""
    _, preprocess = reload(exported(noisy(QWEN), tmp_path / "out"))
    pictures = asked_things()["two images"].pictures
    content = [{"type": "image", "image": Image.fromarray(rgb)} for rgb in pictures]
    message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = preprocess.apply_chat_template([message], **options)
    expected = our_inputs(QWEN, Tokenizer(tokenizer_dir(), 320), CheckedPrompt(pictures=pictures))
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_a_tied_head_is_exported_as_a_tensor_of_its_own(shared: bool, tmp_path: Path) -> None:
    """The smallest base models tie it; Molmo2's files do not, whether or not the two are one tensor in memory."""
    weights = weights_of(noisy(QWEN))
    table = weights["text.embedding.base"]
    weights["lm_head.weight"] = table if shared else table.clone()
    differences = export.export_model(QWEN, weights, tokenizer_dir(), tmp_path / "out", ABOUT)
    assert set(differences) == {"text", "image", "two images", "video"}
    theirs, _ = reload(tmp_path / "out")
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.lm_head.weight, table)
    assert torch.equal(theirs.get_input_embeddings().weight[:320], table)
    again = hub.from_foreign({name: t.shape for name, t in weights.items()}, hub.open_tensors(tmp_path / "out"))
    assert all(torch.equal(again[name](), tensor) for name, tensor in weights.items())


def test_files_have_the_released_layout(tmp_path: Path) -> None:
    out = exported(noisy(QWEN), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) & 0o044 for path in out.iterdir()} == {0o044}
    with safe_open(out / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    assert len(shapes) == 106
    assert shapes["model.transformer.wte.embedding"] == [320, 64]
    assert shapes["model.transformer.wte.new_embedding"] == [16, 64]
    assert shapes["lm_head.weight"] == [320, 64]
    assert shapes["model.transformer.blocks.2.self_attn.att_proj.weight"] == [64 + 32 + 32, 64]
    config = json.loads((out / "config.json").read_text())
    assert config["vit_config"]["image_num_pos"] == 36 and config["adapter_config"]["vit_layers"] == [3, 1]
    parts = [config[name] for name in ("text_config", "vit_config", "adapter_config")]
    assert [part["attn_implementation"] for part in parts] == ["sdpa"] * 3
    generation = json.loads((out / "generation_config.json").read_text())
    assert config["transformers_version"] == generation["transformers_version"] == transformers.__version__
    report = json.loads((out / "export.json").read_text())
    assert report["origin"] == ORIGIN
    assert set(report["largest_logit_difference"]) == {"text", "image", "two images", "video"}
    assert max(report["largest_logit_difference"].values()) <= TOLERANCE


def test_transformers_reads_every_setting(tmp_path: Path) -> None:
    theirs, preprocess = reload(exported(noisy(YARN), tmp_path / "out"))
    wanted = reference_config(YARN)
    for part in ("text_config", "vision_config", "adapter_config"):
        got, want = getattr(theirs.config, part).to_dict(), getattr(wanted, part).to_dict()
        differing = {name for name in want if got.get(name) != want[name]}
        assert differing <= {"dtype", "architectures", "transformers_version"}, part
    for processor in (preprocess.image_processor, preprocess.video_processor):
        assert processor.do_resize and processor.do_rescale and processor.do_normalize and processor.do_convert_rgb
    assert preprocess.image_processor.overlap_margins == [1, 1] and preprocess.image_processor.patch_size == 14
    assert preprocess.image_processor.size["height"] == preprocess.video_processor.size["height"] == 84
    assert preprocess.tokenizer.padding_side == "left" and preprocess.tokenizer.model_max_length == 4096
    assert preprocess.video_processor.num_frames == 384 and preprocess.image_processor.max_crops == 8
    tokenizer, generation = Tokenizer(tokenizer_dir(), 320), theirs.generation_config
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (tokenizer.bos, tokenizer.eos, tokenizer.pad) and not generation.do_sample


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_every_preset(name: str) -> None:
    from transformers import Molmo2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = PRESETS[name].text
    config = Molmo2Config.from_dict(hub.hub_config(PRESETS[name])).text_config
    assert config.rope_parameters["rope_theta"] == text.rope_theta
    if text.rope_scaling:
        assert tuple(config.rope_scaling_layers) == text.rope_scaling.layers
        frequencies, factor = rope_frequencies(text, text.rope_scaling.layers[0])
        expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        torch.testing.assert_close(frequencies, expected, atol=0, rtol=1e-6)
        assert factor == expected_factor
    else:
        assert config.rope_parameters["rope_type"] == "default"


def test_shards_and_index(tmp_path: Path) -> None:
    model = noisy(QWEN)
    hub.write_hub(weights_of(model), tmp_path, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    again = hub.from_foreign(shapes, hub.open_tensors(tmp_path))
    assert again.keys() == shapes.keys()
    assert all(torch.equal(again[name](), tensor) for name, tensor in model.state_dict().items())


def test_misfits_are_listed(tmp_path: Path) -> None:
    model = noisy(QWEN)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = dict(hub.to_hub(model.state_dict()))
    tensors["model.surplus"] = tensors.pop("model.transformer.ln_f.weight")
    tensors["lm_head.weight"] = torch.zeros(7, 64)
    with pytest.raises(hub.WeightsError) as caught:
        hub.from_foreign(shapes, tensors)
    message = str(caught.value)
    assert "missing model.transformer.ln_f.weight" in message
    assert "unexpected model.surplus" in message
    assert "lm_head.weight: shape [7, 64], wanted [320, 64]" in message
    with pytest.raises(FileNotFoundError, match="safetensors"):
        hub.open_tensors(tmp_path)


def test_a_difference_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(QWEN)
    written = dataclasses.replace(QWEN, text=dataclasses.replace(QWEN.text, rope_theta=1e4))
    wrong = hub.hub_config(written)
    monkeypatch.setattr(export, "hub_config", lambda config: wrong)
    with pytest.raises(ExportError, match="logits in transformers differ"):
        exported(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["two images", "video"])
def test_a_difference_in_one_kind_of_prompt_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that only several images, or only videos, depend on."""
    wrong = export.processor_configs(QWEN)
    if kind == "video":
        wrong["video_preprocessor_config.json"]["image_mean"] = [0.4] * 3
    else:
        template = (export.TEMPLATE).read_text()
        assert "Image " in template
        (tmp_path / "wrong.jinja").write_text(template.replace("Image ", "Picture "))
        monkeypatch.setattr(export, "TEMPLATE", tmp_path / "wrong.jinja")
    monkeypatch.setattr(export, "processor_configs", lambda config: wrong)
    with pytest.raises(ExportError, match=f"{kind}"):
        exported(noisy(QWEN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    model = noisy(QWEN)
    out = exported(model, tmp_path / "out")
    (out / "stale").touch()
    exported(model, out)
    assert not (out / "stale").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "export.json").unlink()
    with pytest.raises(ExportError, match="is not an earlier export"):
        exported(model, out)
    assert (out / "model.safetensors").exists()


def test_a_full_disk_and_a_missing_tokenizer_leave_nothing(tmp_path: Path) -> None:
    model = noisy(QWEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            exported(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(TokenizerError, match="nowhere"):
        export.export_model(QWEN, weights_of(model), tmp_path / "nowhere", tmp_path / "out", ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    hub.write_hub(weights_of(noisy(QWEN)), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(hub.WeightsError, match=r"model\.safetensors: no readable"):
        hub.open_tensors(tmp_path)


@pytest.mark.slow
def test_the_tool_exports_a_checkpoint(tmp_path: Path) -> None:
    step = write_checkpoint(tmp_path / "run", tokenizer_dir())
    done = run_tool("--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout and (tmp_path / "out" / "model.safetensors").exists()
    (step / MODEL).write_text("{}")
    refused = run_tool("--checkpoint", step, "--out", tmp_path / "again")
    assert refused.returncode == 1 and "model.json" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "again").exists()
