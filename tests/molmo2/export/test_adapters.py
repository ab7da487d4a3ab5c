"""Adapters alone: plain peft adds them to transformers' Molmo2, which then gives the logits of the merged export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
import yaml
from exports import ABOUT, exported, noisy, reload, run_tool, write_checkpoint
from peft import PeftModel
from processing_cases import noise, tokenizer_dir
from safetensors.torch import load_file
from tiny_models import OLMO, QWEN
from train_runs import train
from transformers import Molmo2ForConditionalGeneration

from molmo2.checkpoint.files import META, MODEL, RECIPE, STATES, WEIGHTS, file_hash
from molmo2.checkpoint.lookup import load_weights, open_checkpoint
from molmo2.export.adapters import export_adapters
from molmo2.export.check import CheckedPrompt, ExportError, their_inputs
from molmo2.export.model import export_model
from molmo2.model.lora import add_adapters
from molmo2.model.presets import ModelConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft's
]
LORA = {"rank": 4, "alpha": 12.0}
ASKED = (CheckedPrompt(), CheckedPrompt(pictures=[noise(100, 170)]))


def noisy_run(run: Path, config: ModelConfig, freeze: list[str]) -> Path:
    """A checkpoint of a LoRA run on `noisy(config)`, with noise in all that is trained and is not frozen."""
    model = noisy(config)
    add_adapters(model, LORA["rank"], LORA["alpha"], 3)
    model.freeze(freeze)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    step = write_checkpoint(run, tokenizer_dir())
    recipe = json.loads((step / RECIPE).read_text())
    recipe |= {"optim": {"lora": LORA}, "train": {"steps": 3, "precision": "fp32", "freeze": freeze}}
    (step / RECIPE).write_text(json.dumps(recipe))
    (step / MODEL).write_text(json.dumps(config.to_json()))
    (step / STATES).mkdir()
    weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    torch.save({"module": weights}, step / STATES / "mp_rank_00_model_states.pt")
    (step / WEIGHTS).unlink()
    rehash(step)
    return step


def rehash(step: Path) -> None:
    meta = json.loads((step / META).read_text())
    paths = [path for path in step.rglob("*") if path.is_file() and path.name != META]
    files = {path.relative_to(step).as_posix(): [path.stat().st_size, file_hash(path)] for path in paths}
    (step / META).write_text(json.dumps(meta | {"files": files}))


def logits(model: Any, preprocess: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(**their_inputs(preprocess, asked)).logits for asked in ASKED]


@pytest.mark.parametrize(
    ("config", "freeze", "beside"),
    [
        (QWEN, ["vit"], {"multi_modal_projector", "trainable_tokens_delta"}),
        (QWEN, ["vit", "connector"], set()),
        (OLMO, [], {"vision_tower", "multi_modal_projector", "trainable_tokens_delta"}),
    ],
    ids=["connector trained", "adapters alone", "olmo, all trained"],
)
def test_peft_gives_the_logits_of_the_merged_export(
    config: ModelConfig, freeze: list[str], beside: set[str], tmp_path: Path
) -> None:
    step = noisy_run(tmp_path / "run", config, freeze)
    base = exported(noisy(config), tmp_path / "base")
    differences = export_adapters(open_checkpoint(step), str(base), tmp_path / "adapters", ABOUT)
    assert max(differences.values()) < 1e-4
    _, weights, _ = load_weights(step)
    export_model(config, weights, tokenizer_dir(), tmp_path / "merged", ABOUT)
    merged, preprocess = reload(tmp_path / "merged")
    plain = Molmo2ForConditionalGeneration.from_pretrained(base)
    before, wanted = logits(plain, preprocess), logits(merged, preprocess)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapters")
    for found, own, old in zip(logits(adapted, preprocess), wanted, before, strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-4)
        assert (own - old).abs().max() > 0.1
    tensors = load_file(tmp_path / "adapters/adapter_model.safetensors")
    assert sum(".lora_" in name for name in tensors) == 2 * 7 * config.text.num_layers
    others = {part for name in tensors if ".lora_" not in name for part in name.split(".")}
    assert others & {"vision_tower", "multi_modal_projector", "trainable_tokens_delta"} == beside


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(noisy_run(tmp_path / "run", QWEN, ["vit"]))
    base = exported(noisy(QWEN), tmp_path / "base")
    monkeypatch.setattr("molmo2.export.adapters.locate", lambda name: base)  # in place of a download
    for revision in ("", "abc"):
        export_adapters(checkpoint, f"owner/name@{revision}".rstrip("@"), tmp_path / "out", ABOUT)
        settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/name", revision or None)
        card = (tmp_path / "out/README.md").read_text()
        assert "\nbase_model: owner/name\n" in card and ('revision="abc", ' in card) == bool(revision)


def test_another_base_and_a_run_without_adapters_are_refused(tmp_path: Path) -> None:
    step = noisy_run(tmp_path / "run", QWEN, ["vit"])
    checkpoint, out = open_checkpoint(step), tmp_path / "out"
    base = exported(noisy(OLMO), tmp_path / "olmo")
    with pytest.raises(ExportError, match=r"olmo is not the model from which the run began: text\.num_kv_heads 4"):
        export_adapters(checkpoint, str(base), out, ABOUT)
    other = noisy(QWEN)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    base = exported(other, tmp_path / "other")
    with pytest.raises(ExportError, match=r"logits in transformers differ .* is .*other the model from which"):
        export_adapters(checkpoint, str(base), out, ABOUT)
    (step / RECIPE).write_text(json.dumps(checkpoint.read(RECIPE) | {"optim": {"lora": None}}))
    with pytest.raises(ExportError, match=r"trained without optim\.lora; export it whole"):
        export_adapters(checkpoint, str(base), out, ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "olmo", "other"}


@pytest.mark.dist
def test_the_adapters_of_a_run_in_half_precision_load_as_the_card_says(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    train(tmp_path, toy_run.write_recipe(tmp_path / "a.yaml", "a", steps=2, packs_per_step=2), ranks=1)
    run_tool(
        "--checkpoint", tmp_path / "runs/a", "--out", tmp_path / "base", MOLMO2_DATA=str(tmp_path)
    ).check_returncode()
    recipe = toy_run.write_recipe(tmp_path / "b.yaml", "b", steps=4, packs_per_step=2, zero_stage=2, precision="bf16")
    settings = yaml.safe_load(recipe.read_text())
    settings["init"] = {"molmo2": str(tmp_path / "base")}
    recipe.write_text(yaml.safe_dump(settings))
    train(tmp_path, recipe, "--set", "optim.lora={rank: 4, alpha: 8}")
    out = tmp_path / "adapters"
    for _ in range(2):  # the second replaces the first
        words = ("--checkpoint", "b", "--adapters-for", tmp_path / "base", "--out", out)
        done = run_tool(*words, MOLMO2_DATA=str(tmp_path))
        assert done.returncode == 0 and "largest difference" in done.stdout, done.stderr
    assert json.loads((out / "export.json").read_text())["origin"]["run"] == "b"
    card = (out / "README.md").read_text()
    assert "the vision transformer, the connector and the embeddings" in card and "base_model:" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("DIRECTORY", str(out)), names)
    assert names["base"].dtype == torch.bfloat16
    done = run_tool("--checkpoint", "b", "--out", tmp_path / "merged", MOLMO2_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    processor, plain = names["processor"], reload(tmp_path / "base")[0]
    before, wanted = logits(plain, processor), logits(reload(tmp_path / "merged")[0], processor)
    for found, own, old in zip(logits(names["model"], processor), wanted, before, strict=True):
        difference = (found.float() - own).abs().max()  # the card's model computes in bfloat16
        assert difference < 0.1 * (old - own).abs().max(), difference
