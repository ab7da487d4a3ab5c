"""An export that was fine-tuned with transformers' Trainer, and saved by it, is read back by every tool of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exports import ABOUT, reload, run_tool, weights_of
from PIL import Image
from processing_cases import noise

from molmo2.chat.conversation import answer, conversation
from molmo2.config import FirstWeights
from molmo2.export.model import export_model
from molmo2.model.generate import Sampling
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.processing.contract import ProcessorSettings
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import build_processor
from molmo2.weights.load import open_model
from molmo2.weights.names import open_tensors
from molmo2.weights.pretrained import first_weights
from shards.schema import Turn

TINY = PRESETS["tiny"]
STEPS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_demo_tokenizer(["what is there? a field, red and blue, user assistant"] * 4, directory, TINY.text.vocab_size)
    return directory


@pytest.fixture(scope="module")
def trained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Transformers' model after two steps of its Trainer, and the directory that the Trainer saved."""
    root = tmp_path_factory.mktemp("trainer")
    export_model(TINY, weights_of(Molmo2(TINY).init_weights(0)), tokenizer, root / "export", ABOUT)
    model, processor = reload(root / "export")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.fromarray(noise(60, 90))}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a field"}]},
    ]

    def batch(rows: list[Any]) -> dict[str, Any]:
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(rows[0], return_assistant_tokens_mask=True, **options)
        answered = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        return {**inputs, "labels": torch.where(answered, inputs["input_ids"], -100)}

    options = transformers.TrainingArguments(
        output_dir=str(root / "run"),
        use_cpu=True,
        report_to=[],
        max_steps=STEPS,
        learning_rate=1e-2,
        remove_unused_columns=False,
        per_device_train_batch_size=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model, args=options, train_dataset=[messages] * STEPS, data_collator=batch, processing_class=processor
    )
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    trainer.save_model(str(root / "saved"))
    return model.eval(), root / "saved"


@pytest.mark.slow
def test_a_run_starts_from_it(trained: tuple[Any, Path], tokenizer: Path) -> None:
    theirs, saved = trained
    shapes = {name: tensor.shape for name, tensor in open_tensors(saved).items()}
    names = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
    assert shapes[names[0]] == shapes[names[1]]  # transformers cuts the table into halves
    found = first_weights(FirstWeights(molmo2=str(saved)), TINY, tokenizer, 0, lambda text: None)
    table = torch.cat([found["text.embedding.base"](), found["text.embedding.added"]()])
    assert torch.equal(table, theirs.get_input_embeddings().weight)
    assert torch.equal(found["lm_head.weight"](), theirs.lm_head.weight)


@pytest.mark.slow
def test_chat_answers_as_transformers(trained: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, saved = trained
    opened = open_model(str(saved))
    assert opened.config == TINY
    settings = ProcessorSettings(preset="tiny", tokenizer_dir=str(opened.tokenizer_dir), stage="eval", num_variants=1)
    processor = build_processor(settings)
    Image.fromarray(noise(60, 90)).save(tmp_path / "a.png")
    asked = conversation([Turn(role="user", text="what?")], [tmp_path / "a.png"], None)
    ours = Molmo2.for_inference(opened.config, opened.weights, "cpu", "fp32")
    said = "".join(answer(ours, processor, asked, Sampling(), 8))
    _, preprocess = reload(saved)
    content = [{"type": "image", "image": Image.fromarray(noise(60, 90))}, {"type": "text", "text": "what?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = preprocess.apply_chat_template([{"role": "user", "content": content}], **options)
    output = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == preprocess.decode(output, skip_special_tokens=True) != ""


@pytest.mark.slow
def test_the_tool_exports_it_as_a_release(trained: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, saved = trained
    done = run_tool("--checkpoint", saved, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    tensors = open_tensors(tmp_path / "out")
    assert tensors["model.transformer.wte.embedding"].shape[0] == TINY.text.vocab_size
    again, _ = reload(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert f"| directory | {saved} |" in (tmp_path / "out/README.md").read_text()
