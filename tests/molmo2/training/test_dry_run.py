"""The estimate before a run: against what autograd keeps, against figures worked out elsewhere, and as a tool."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
import yaml
from fork_server import python

from molmo2.config import Recipe, load_recipe
from molmo2.inspection.look import dry_run_lines
from molmo2.inspection.shares import draw_steps
from molmo2.model.activations import SavedBytes, activation_bytes, kept_bytes, measure_saved, saved_bytes
from molmo2.model.lora import add_adapters
from molmo2.model.mask import AttentionMask
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.training.dry_run import (
    ALLOCATOR_MARGIN,
    GIB,
    Gpu,
    count_parameters,
    dry_run,
    host_memory,
    memory,
    micro_batch,
    operations,
    this_gpu,
)
from molmo2.training.recipe_warnings import recipe_warnings
from shards.stream.plan import open_plan

ROOT = Path(__file__).resolve().parents[3]
STAGE1 = ROOT / "recipes/stage1.yaml"


def long(**train: Any) -> Recipe:
    """One row of 36,864 tokens with 384 frames, every parameter trained."""
    base = {"recompute": "full", "micro_batch": 1, "packs_per_step": 128, "zero_stage": 2, **train}
    settings = [f"train.{name}={value}" for name, value in base.items()]
    sizes = ["data.sequence_length=36864", "data.max_crops=384", "optim.freeze_base_embedding=false"]
    return load_recipe(STAGE1, [*settings, *sizes])


def test_layers_keep_what_was_measured_of_their_size() -> None:
    kept = measure_saved(PRESETS["4b"], torch.bfloat16)
    # Measured on transformers' Qwen3-4B and SigLIP: 166.8 KiB a token, 34.9 KiB a patch.
    assert kept.layer / 1024 == pytest.approx(166.8, rel=0.1)
    assert kept.block / 1024 / PRESETS["4b"].patches_per_crop == pytest.approx(34.9, rel=0.1)
    assert kept.layer_input == 2560 * 2


@pytest.mark.parametrize("level", ["none", "light", "full"])
def test_activations_of_a_whole_model_are_as_estimated(level: str) -> None:
    config = PRESETS["tiny"]
    model = Molmo2(config).init_weights(0).train()
    model.set_recompute(level)
    tokens, frames, window = 1024, 8, config.video_pool**2
    patches = frames * config.patches_per_crop
    pooling = torch.arange(patches // window * window).view(-1, window)
    pixels = torch.zeros(frames, config.crop_size, config.crop_size, 3, dtype=torch.uint8)
    mask = AttentionMask(torch.zeros(1, tokens, dtype=torch.int32), torch.zeros(1, tokens, dtype=torch.bool))

    def run() -> torch.Tensor:
        features = model.encode_visuals(pixels, pooling)
        x = model.text.embedding(torch.zeros(1, tokens, dtype=torch.int64)) + features.sum() * 0
        return model.decode(
            x,
            torch.arange(tokens)[None],
            mask,
            lambda q, k, v, _: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
        )

    settings = [f"data.sequence_length={tokens}", f"data.max_crops={frames}", f"train.recompute={level}"]
    recipe = load_recipe(STAGE1, [*settings, "train.micro_batch=1", "model=tiny"])
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "fp32"})})
    kept = measure_saved(config, torch.float32)
    parts = kept_bytes(config, kept, micro_batch(recipe))
    assert saved_bytes(model, run) == pytest.approx(sum(parts.values()), rel=0.1)
    whole = activation_bytes(config, kept, micro_batch(recipe))
    assert all((whole[name] == parts[name]) == (level == "none" or name == "connector") for name in parts)


def test_a_light_layer_keeps_input_queries_keys_values_and_result() -> None:
    kept, text = measure_saved(PRESETS["4b"], torch.bfloat16), PRESETS["4b"].text
    width = text.hidden_size + 2 * text.head_dim * (text.num_heads + text.num_kv_heads)
    assert kept.layer_light == pytest.approx(2 * width, rel=0.01)  # and the sum of each softmax


@pytest.mark.slow
def test_a_long_row_needs_what_was_worked_out_for_it() -> None:
    """8 GPUs, ZeRO-2, checkpoints: 59 / 42 / 34 / 30 GiB at sp 1 / 2 / 4 / 8, the connector's share left out there."""
    kept = measure_saved(PRESETS["4b"], torch.bfloat16)
    for sp, expected in ((1, 59), (2, 42), (4, 34), (8, 30)):
        need = memory(long(sp=sp), 8, kept)
        assert (sum(need.values()) - need["connector"]) / GIB == pytest.approx(expected, rel=0.15), sp
    assert sum(memory(long(sp=2), 8, kept).values()) < sum(memory(long(), 8, kept).values())


@pytest.mark.parametrize(("stage", "gib"), [(1, 22.8 + 8.3), (2, 15.6 + 1.0), (3, 8.3 + 1.0)])
def test_states_follow_the_zero_stages(stage: int, gib: float) -> None:
    """4.46 B parameters on 8 GPUs there; here the head is a table of its own, 0.39 B more."""
    recipe = long(zero_stage=max(stage, 2))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"zero_stage": stage})})
    need = memory(recipe, 8, measure_saved(PRESETS["tiny"], torch.bfloat16))
    states = (need["parameters"] + need["gradients"] + need["optimizer"]) / ALLOCATOR_MARGIN / GIB
    assert states == pytest.approx(gib * 4.85 / 4.46, rel=0.15)


def test_memory_of_the_host() -> None:
    """4.85 B parameters; the base embedding, 0.39 B, is trained here; 384 frames of 378 x 378 pixels a batch."""
    kept = SavedBytes(
        layer=0, layer_light=0, layer_input=2560 * 2, norm=0, block=0, block_input=729 * 1152 * 2, connector=0
    )
    need = host_memory(long(), 8, kept)
    assert need["start"] == pytest.approx(4 * 0.39e9, rel=0.02)  # one tensor at a time, by rank 0 alone
    assert need["optimizer"] == need["activations"] == 0
    assert need["batches"] == 8 * 4 * 4 * 384 * 378**2 * 3  # 4 workers, each with 4 ready
    need = host_memory(long(offload="[activations,optimizer]"), 16, kept)
    assert need["optimizer"] == pytest.approx(12 * 4.85e9 * 8 / 16, rel=0.02)
    assert need["activations"] == 8 * (36864 * 36 * 5120 + 384 * PRESETS["4b"].vit.num_layers * 729 * 1152 * 2)


def test_operations_of_a_long_row() -> None:
    """4.95 PFLOP with recomputation, counting 81 % of the pairs; one video in a full row."""
    assert operations(long()) / 128 == pytest.approx(4.95e15, rel=0.15)


@pytest.mark.slow
def test_what_to_change_is_told_where_a_card_is_too_small() -> None:
    gpu = Gpu(memory_gib=80, peak_tflops=989, price=2.5)
    lines = dry_run(load_recipe(STAGE1, ["train.recompute=full"]), gpu)
    (row,) = (line.split() for line in lines if line.split()[:1] == ["8"])
    assert float(row[-1].replace(",", "")) == pytest.approx(float(row[-2]) * 24 * 8 * 2.5, rel=0.01)
    assert "days at 40% of 989 TFLOP/s (assumed), USD at 2.5 per GPU and hour" in "\n".join(lines)
    advice = [line for line in lines if "train.zero_stage=3" in line]
    assert advice and all("train.recompute" not in line for line in advice)
    (levels,) = (line for line in lines if line.startswith("the least train.recompute for 80 GiB, by GPUs: 1: too sm"))
    assert ", 8: light (" in levels and "none" not in levels
    less = dry_run(load_recipe(STAGE1, ["train.recompute=none"]), gpu)
    assert levels in less
    first = less.index("where 80 GiB are too few, --set these (GiB of one GPU, by number of GPUs):") + 1
    changes = [line.split(": ")[0].strip() for line in less[first : first + 3]]
    assert changes == ["train.recompute=light", "train.recompute=full", "train.recompute=full train.micro_batch=1"]
    offloaded = dry_run(load_recipe(STAGE1, ["train.recompute=full", "train.offload=[activations]"]), gpu)
    assert any(line.startswith("the least train.recompute") and "light" not in line for line in offloaded)
    assert "train.offload=[activations,optimizer]" in lines[-1]
    assert any(line.startswith("GiB of the host's memory, one machine with 8 GPUs: start ") for line in lines)


def test_nothing_is_suggested_where_the_memory_is_enough_or_not_known() -> None:
    tiny = load_recipe(STAGE1, ["model=tiny"])
    larger = dry_run(tiny, Gpu(memory_gib=1000, peak_tflops=989))
    assert "train.zero_stage=3" not in "\n".join(larger) and "USD" not in "\n".join(larger)
    unknown = dry_run(tiny, Gpu(memory_gib=None, peak_tflops=989))
    smaller = dry_run(tiny, Gpu(memory_gib=0.1, peak_tflops=989))
    assert any("where 0.1 GiB are too few" in line for line in smaller)
    assert "the least train.recompute for 1e+03 GiB, by GPUs: 1: none (" in "\n".join(larger)
    assert "--gpu-memory GIB" in unknown[-1] and "train.zero_stage=3" not in "\n".join(unknown)


def test_the_gpu_is_the_one_named_or_the_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(STAGE1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_gpu(recipe) == Gpu(memory_gib=None, peak_tflops=989)
    assert this_gpu(recipe, 40, 1.5) == Gpu(memory_gib=40, peak_tflops=989, price=1.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * GIB, 40 * GIB))
    assert this_gpu(recipe) == Gpu(memory_gib=40, peak_tflops=312)
    assert this_gpu(load_recipe(STAGE1, ["logging.peak_tflops=100"]), 24) == Gpu(memory_gib=24, peak_tflops=100)


def test_a_dry_run_shows_recipe_and_plan_of_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_run.build_toy(tmp_path)
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    recipe = load_recipe(toy_run.write_recipe(tmp_path / "r.yaml", "r", steps=12))
    lines = dry_run_lines(recipe, this_gpu(recipe, 80, 2.0))
    assert yaml.safe_load("\n".join(lines[: lines.index("")])) == recipe.model_dump(mode="json")
    header = next(line for line in lines if line.startswith("dataset "))
    assert header.split()[-2:] == ["steps/epoch", "epochs"]
    (row,) = (line.split() for line in lines if line.startswith("toy "))
    drawn = draw_steps(open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings), 12)
    steps_per_epoch = 24 / (drawn.samples[0] / 12)
    assert float(row[-2]) == pytest.approx(steps_per_epoch, abs=0.06)
    assert float(row[-1]) == pytest.approx(12 / steps_per_epoch, abs=0.01)
    table = next(number for number, line in enumerate(lines) if line.split()[:2] == ["ranks", "dp"])
    assert lines[table + 1].split()[:2] == ["1", "1"]
    warmed = load_recipe(tmp_path / "r.yaml", ["optim.vit.warmup_fraction=0.5"])
    assert any(
        line.startswith("r: WARNING: the warm-up of optim.vit takes 6 of 12 steps")
        for line in dry_run_lines(warmed, this_gpu(warmed, 80))
    )
    (tmp_path / "shards/sft/toy/index.json").unlink()
    assert any(line.startswith("plan: dataset toy is in none of") for line in dry_run_lines(recipe, this_gpu(recipe)))


def test_crops_are_those_that_the_tokens_of_a_pack_can_hold() -> None:
    """A frame has 81 tokens: 2,048 tokens hold 25 of them."""
    recipe = load_recipe(STAGE1, ["data.sequence_length=2048", "data.max_crops=384", "train.micro_batch=2"])
    assert micro_batch(recipe).crops == 2 * 25
    assert micro_batch(long()).crops == 384


def test_the_gradient_of_the_head_and_the_logits_of_a_chunk_are_counted() -> None:
    kept = measure_saved(PRESETS["tiny"], torch.bfloat16)
    text = PRESETS["4b"].text
    need = memory(long(), 8, kept)
    assert need["head"] == pytest.approx(ALLOCATOR_MARGIN * 2 * 2 * text.vocab_size * text.hidden_size)
    assert need["logits"] == ALLOCATOR_MARGIN * 2 * GIB  # compiled
    assert memory(long(compile="false"), 8, kept)["logits"] == ALLOCATOR_MARGIN * GIB
    assert memory(long(freeze="[llm]"), 8, kept)["head"] == 0


def test_a_budget_lies_between_none_and_light() -> None:
    kept = measure_saved(PRESETS["4b"], torch.bfloat16)
    recipes = [long(recompute="light")]
    recipes += [long(recompute="none", compile="true", activation_budget=part) for part in (0.01, 0.5, 1.0)]
    needs = [memory(recipe, 8, kept)["language model"] for recipe in recipes]
    assert needs[1] == pytest.approx(needs[0], rel=0.05) and needs == sorted(needs)
    lines = dry_run(load_recipe(STAGE1), Gpu(memory_gib=141, peak_tflops=989))
    (levels,) = (line for line in lines if line.startswith("the least train.recompute for 141 GiB"))
    assert ", 8: none, activation_budget 0.4 (" in levels


def test_days_follow_the_mfu_of_a_run(tmp_path: Path) -> None:
    steps = [{"step": 1, "mfu": 0.01}, {"step": 2, "mfu": 0.2}, {"step": 3, "mfu": 0.2}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    recipe = load_recipe(STAGE1, ["model=tiny"])
    measured, assumed = (dry_run(recipe, this_gpu(recipe, 80, 1.0, run)) for run in (tmp_path, None))
    assert "days at 20% of 989 TFLOP/s (measured MFU)" in "\n".join(measured)
    cost = [next(line for line in lines if line.split()[:1] == ["8"]).split() for lines in (measured, assumed)]
    assert float(cost[0][-1].replace(",", "")) == pytest.approx(2 * float(cost[1][-1].replace(",", "")), abs=1)
    with pytest.raises(ValueError, match="is missing or has no MFU; --measured takes the folder of a run on a GPU"):
        this_gpu(recipe, measured=tmp_path / "none")


@pytest.mark.slow
def test_dry_run_needs_no_data_and_no_launcher(tmp_path: Path) -> None:
    command = [python(), "molmo2/train.py", "--recipe", str(STAGE1), "--dry-run"]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={"MOLMO2_DATA": str(tmp_path)}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("name: stage1\n") and "plan: dataset pixmo-cap is in none of" in run.stdout
    assert "stage1: 4b, 100,000 steps of 128 packs of 4,096 tokens" in run.stdout
    assert not list(tmp_path.iterdir())
    run = subprocess.run([*command, "--set", "model=5b"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "model '5b' is not a preset" in run.stderr
    command[-1] = "--gpu-price=2"
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "--gpu-memory, --gpu-price and --measured are of --dry-run" in run.stderr


def test_a_frozen_component_needs_neither_states_nor_its_backward() -> None:
    kept = measure_saved(PRESETS["tiny"], torch.bfloat16)
    whole, frozen = memory(long(), 8, kept), memory(long(freeze="[vit]"), 8, kept)
    with torch.device("meta"):
        vit = sum(parameter.numel() for parameter in Molmo2(PRESETS["4b"]).vit.parameters())
    assert whole["optimizer"] - frozen["optimizer"] == pytest.approx(ALLOCATOR_MARGIN * 12 * vit / 8)
    assert whole["gradients"] - frozen["gradients"] == pytest.approx(ALLOCATOR_MARGIN * 4 * vit / 8)
    assert frozen["parameters"] == whole["parameters"] and frozen["vision"] < whole["vision"]
    assert operations(long(freeze="[vit]")) < 0.9 * operations(long())


@pytest.mark.parametrize("freeze", ["[]", "[vit]"])
def test_adapters_are_counted_as_peft_makes_them(freeze: str) -> None:
    recipe = load_recipe(STAGE1, ["model=tiny", "optim.lora={rank: 4, alpha: 8}", f"train.freeze={freeze}"])
    with torch.random.fork_rng():
        model = Molmo2(PRESETS["tiny"])
        add_adapters(model, 4, 8, 0)
    model.freeze(recipe.train.freeze, recipe.optim.freeze_base_embedding)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    every = [parameter.numel() for parameter in model.parameters()]
    assert count_parameters(recipe, PRESETS["tiny"]) == (sum(every), sum(trained))


@pytest.mark.slow
def test_the_recipe_for_lora_fits_one_gpu_of_24_gb() -> None:
    recipe = load_recipe(ROOT / "recipes/lora.yaml")
    kept = measure_saved(PRESETS["4b"], torch.bfloat16)
    assert sum(memory(recipe, 1, kept).values()) < 22 * GIB  # of 24 GB, CUDA itself and others take some
    whole = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lora": None})})
    assert sum(memory(whole, 1, kept).values()) > 60 * GIB
    assert recipe_warnings(recipe, None, "cuda") == []
