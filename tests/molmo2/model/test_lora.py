"""Adapters on the language model: what trains, what stays, that they resume and that readers get them merged."""

import json
from pathlib import Path

import engine_cases
import pytest
import torch
import toy_run
from train_runs import assert_same_curve, branch_off, curve, train

from molmo2.checkpoint.lookup import load_weights
from molmo2.config import Lora, RecipeError, load_recipe
from molmo2.model.lora import add_adapters, merged
from molmo2.model.mask import KeyMask
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS

SETTINGS = Lora(rank=4, alpha=8)


def adapted() -> Molmo2:
    model = engine_cases.model()
    add_adapters(model, SETTINGS.rank, SETTINGS.alpha, 3)
    return model


def test_new_adapters_change_nothing_and_alone_train_in_the_language_model() -> None:
    one, plain, other = adapted(), engine_cases.model(), engine_cases.model()
    state = torch.get_rng_state()
    add_adapters(other, SETTINGS.rank, SETTINGS.alpha, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    text = [name for name in trained if not name.startswith(("vit.", "connector."))]
    assert len(text) == 1 + 2 * 7 * engine_cases.CONFIG.text.num_layers
    assert all(".lora_" in name or name == "text.embedding.added" for name in text)
    assert {"vit", "connector"} <= {name.split(".")[0] for name in trained}
    x, positions = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5)[None]
    mask = KeyMask(torch.ones(1, 5) > 0)
    assert torch.equal(one.decode(x, positions, mask), plain.decode(x, positions, mask))


def test_merged_weights_are_the_same_model() -> None:
    model = adapted()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    stored = {name: parameter.detach for name, parameter in model.named_parameters()}
    weights = merged(stored, {"optim": {"lora": SETTINGS.model_dump()}})
    plain = Molmo2.with_weights(model.config, {name: read() for name, read in weights.items()})
    x, positions, mask = (
        torch.randn(1, 5, 32, generator=generator),
        torch.arange(5)[None],
        KeyMask(torch.ones(1, 5) > 0),
    )
    found, wanted = plain.decode(x, positions, mask), model.decode(x, positions, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, engine_cases.model().decode(x, positions, mask), atol=1e-2)


@pytest.mark.dist
def test_a_run_resumes_and_its_checkpoints_are_read_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    toy_run.build_toy(tmp_path)
    lora = ["--set", "optim.lora={rank: 4, alpha: 8}"]
    recipe = toy_run.write_recipe(tmp_path / "a.yaml", "a", steps=4, zero_stage=2, packs_per_step=2)
    train(tmp_path, recipe, *lora)
    branch_off(tmp_path, "b", "a", 2)
    train(tmp_path, toy_run.write_recipe(tmp_path / "b.yaml", "b", steps=4, zero_stage=2, packs_per_step=2), *lora)
    assert curve(tmp_path, "a") == curve(tmp_path, "b")
    seed = json.loads((tmp_path / "runs/a/checkpoints/step-00000004/recipe.json").read_text())["train"]["seed"]
    start = Molmo2(PRESETS["tiny"]).init_weights(seed).state_dict()
    for checkpoint in (tmp_path / "runs/a/checkpoints/step-00000002", "a"):  # in mid-run, and finished
        config, weights, _ = load_weights(checkpoint)
        Molmo2.with_weights(config, weights)
        moved = {name for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
        layers = {name for name in weights if "_proj" in name and name.startswith("text.")}
        assert {name for name in moved if name.startswith(("text.", "lm_head"))} == layers | {"text.embedding.added"}
    with pytest.raises(RecipeError, match="is untested and refused"):
        load_recipe(recipe, [lora[1], "train.zero_stage=3"])


@pytest.mark.dist
def test_adapters_in_half_precision_move_to_other_ranks(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path)
    lora = ["--set", "optim.lora={rank: 4, alpha: 8}", "train.precision=bf16"]
    train(tmp_path, toy_run.write_recipe(tmp_path / "a.yaml", "a", steps=4, zero_stage=2, packs_per_step=2), *lora)
    branch_off(tmp_path, "b", "a", 2)
    recipe = toy_run.write_recipe(tmp_path / "b.yaml", "b", steps=4, zero_stage=2, packs_per_step=2)
    output = train(tmp_path, recipe, *lora, ranks=1)
    assert "world was 2, is 1: the checkpoint was converted" in output
    assert_same_curve(tmp_path, "b", "a", 1e-2)
    (_, one, _), (_, other, _) = (load_weights(tmp_path / "runs" / name) for name in ("a", "b"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=2e-3) for name in one)
