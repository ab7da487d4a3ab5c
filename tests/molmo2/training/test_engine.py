"""Ranks, sequence parallelism, ZeRO stages and micro-steps change nothing: loss, gradients, norms, trained weights."""

import os
import subprocess
import sys
from pathlib import Path

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from molmo2.checkpoint.lookup import load_weights
from molmo2.model.activations import saved_bytes
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import TrainingModule, deepspeed_config, read_engine_keys


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "level", "heads"),
    [(2, "none", (6, 3)), (2, "full", (5, 1)), (3, "light", (7, 1)), (4, "none", (6, 2)), (8, "full", (14, 2))],
)
def test_sequence_parallel_gradients_equal_one_rank(world: int, level: str, heads: tuple[int, int]) -> None:
    ranks = run_ranks(world, engine_cases.gradients, (level, heads, 0.0))
    for number, case in enumerate(engine_cases.BATCHES):
        module = TrainingModule(engine_cases.model(heads), engine_cases.recipe(), SINGLE).train()
        loss, logged = module(module.place(engine_cases.make(case)))
        loss.backward()
        wanted = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
        for rank in ranks:
            got_loss, got = rank[number]
            torch.testing.assert_close(got_loss, torch.cat([value.flatten() for value in logged]), rtol=1e-5, atol=1e-7)
            assert_same_gradients(got, wanted, f"heads {heads}")


ENGINE_CASES = [(0, (4, 1)), (1, (32, 8)), (2, (4, 1)), (3, (32, 8))]  # ZeRO stage, heads


@pytest.mark.dist
def test_engine_gradients_of_two_groups_equal_one_process_in_every_zero_stage() -> None:
    ranks = run_ranks(4, engine_cases.engine_gradients, ENGINE_CASES)
    wanted = {heads: summed_gradients(heads) for heads in ((4, 1), (32, 8))}
    for rank in ranks:
        for (stage, heads), gradients in zip(ENGINE_CASES, rank, strict=True):
            assert_same_gradients(gradients, wanted[heads], f"ZeRO-{stage}, heads {heads}")


def summed_gradients(heads: tuple[int, int]) -> dict[str, Tensor]:
    """Gradients of a step over all batches in one process, without an engine."""
    module = TrainingModule(engine_cases.model(heads), engine_cases.recipe(), SINGLE).train()
    for case in engine_cases.BATCHES:
        module(module.place(engine_cases.make(case)))[0].backward()
    return {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


def assert_same_gradients(gradients: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert set(gradients) == set(wanted)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # The gradient of a key bias is zero but for rounding, so it has no scale of its own.
        scale = max(gradient.abs().max().item(), 1e-2 * largest, 1e-12)
        difference = (gradients[name] - gradient).abs().max().item() / scale
        assert difference < 1e-5, f"{what}: {name} differs by {difference:.1e}"


@pytest.mark.dist
@pytest.mark.parametrize("level", ["none", "light", "full"])
def test_a_step_has_two_exchanges_a_layer_and_two_gathers(level: str) -> None:
    layers = engine_cases.CONFIG.text.num_layers
    for forward, backward in run_ranks(2, engine_cases.count_collectives, level):
        assert forward == {"alltoall_base_": 2 * layers, "_allgather_base_": 2}
        assert backward == {"alltoall_base_": 2 * layers * (2 if level == "full" else 1), "_reduce_scatter_base_": 2}


SETTINGS = [  # precision, ZeRO stage, sp, base embedding frozen, offload
    ("fp32", 0, 1, False),
    ("fp32", 1, 1, False),
    ("fp32", 2, 2, False),
    ("fp32", 3, 1, False),
    ("fp32", 3, 2, False),
    ("bf16", 2, 2, False),
    ("bf16", 3, 1, False),
    ("fp32", 1, 2, True),
    ("bf16", 2, 1, True),
    ("fp32", 3, 1, True),
    ("fp32", 1, 1, False, "optimizer"),
    ("fp32", 2, 2, False, "optimizer", "activations"),
    ("fp32", 3, 2, False, "optimizer", "activations"),
    ("bf16", 3, 1, False, "optimizer"),
]
EMBEDDING = "text.embedding.base"


@pytest.mark.dist
def test_trained_weights_do_not_depend_on_ranks_or_zero_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    ranks = run_ranks(2, engine_cases.start, (str(tmp_path), SETTINGS))
    alone, steps = engine_cases.train_alone()
    assert min(step.norms["vit"] for step in steps) > 0.05  # clipping binds
    for number, (precision, stage, sp, frozen, *offload) in enumerate(SETTINGS):
        config, weights, meta = load_weights("-".join(map(str, (precision, stage, sp, frozen, *offload))))
        assert config == engine_cases.CONFIG
        assert (meta["zero_stage"], meta["sp"], meta["finished"]) == (stage, sp, True)
        assert set(weights) == set(alone.state_dict())
        exact = precision == "fp32"
        start = engine_cases.model().state_dict()
        if not exact:
            start = {name: weight.bfloat16().float() for name, weight in start.items()}
        assert torch.equal(weights[EMBEDDING], start[EMBEDDING]) == frozen
        if frozen:
            continue
        for trained in (rank[number] for rank in ranks):
            for step, expected in zip(trained, steps, strict=True):
                assert step.loss == pytest.approx(expected.loss, rel=1e-5 if exact else 1e-2)
                assert step.norms == pytest.approx(expected.norms, rel=1e-4 if exact else 0.2)
        if exact:
            for name, expected_weight in alone.state_dict().items():
                torch.testing.assert_close(weights[name], expected_weight, rtol=0, atol=2e-5)
            continue
        for part in ("vit.", "connector.", "text."):  # not weight by weight: AdamW makes noise as large as a gradient
            moved, wanted = movement(weights, start, part), movement(alone.state_dict(), start, part)
            assert torch.cosine_similarity(moved, wanted, dim=0) > 0.98  # 0.990 at least
            assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=0.02)


def movement(weights: dict[str, Tensor], start: dict[str, Tensor], part: str) -> Tensor:
    """How far training moved all weights of a part of the model, in one vector."""
    return torch.cat([(weights[name] - start[name]).flatten() for name in sorted(start) if name.startswith(part)])


FROZEN: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = [  # ZeRO stage, frozen components, offload
    (0, ("vit",), ()),
    (1, ("vit", "connector"), ()),
    (2, ("vit",), ("activations", "optimizer")),
    (2, ("llm",), ("activations",)),
    (3, ("llm", "vit"), ()),
]


@pytest.mark.dist
def test_a_frozen_component_has_no_optimizer_states_and_does_not_move() -> None:
    ranks = run_ranks(2, engine_cases.train_frozen, FROZEN)
    sizes = {name: sum(map(Tensor.numel, part)) for name, part in engine_cases.model().parameter_groups().items()}
    for number, (stage, freeze, offload) in enumerate(FROZEN):
        trained = [name for name in sizes if name not in freeze]
        expected = 2 * 4 * sum(sizes[name] for name in trained)  # two moments in float32
        total = sum(rank[number].state_bytes for rank in ranks) / (1 if stage else len(ranks))
        assert total == pytest.approx(expected, rel=1e-3), (stage, freeze, offload)  # partitions are padded
        for rank in ranks:
            assert rank[number].groups == trained
            assert rank[number].moved == {name: name in trained for name in sizes}, (stage, freeze)


@pytest.mark.parametrize("offload", [False, True])
def test_no_gradient_is_computed_for_a_frozen_vision_transformer(offload: bool) -> None:
    """Torch counts the operations: its backward takes none, and autograd keeps nothing of it."""
    counts, saved = {}, {}
    for freeze in ((), ("vit",)):
        module = TrainingModule(engine_cases.model(), engine_cases.recipe(), SINGLE).train()
        module.model.freeze(freeze)
        module.model.set_recompute("full" if offload else "none", offload=offload)
        batch = engine_cases.make(engine_cases.BATCHES[0])
        saved[freeze] = saved_bytes(module.model, lambda m=module, b=batch: m(m.place(b))[0])
        with FlopCounterMode(display=False) as counter:
            module(module.place(batch))[0].backward()
        counts[freeze] = sum(counter.get_flop_counts()["TrainingModule.model.vit"].values())
        missing = {name for name, parameter in module.model.named_parameters() if parameter.grad is None}
        assert missing == {name for name, _ in module.model.named_parameters() if freeze and name.startswith("vit.")}
    assert counts["vit",] < 0.4 * counts[()]
    assert saved["vit",] < saved[()]


def test_deepspeed_is_told_neither_to_clip_nor_to_split_sequences() -> None:
    config = deepspeed_config(engine_cases.recipe(sp=2))
    assert config["gradient_clipping"] == 0.0
    assert config["managed_gradient_accumulation"] is False
    assert not {"sequence_parallel_size", "train_batch_size", "gradient_accumulation_steps"} & set(config)


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_reduction_overlaps_backward_where_no_group_has_collectives_of_its_own(stage: int, sp: int) -> None:
    """And where DeepSpeed allows it: from stage 2 on."""
    config = deepspeed_config(engine_cases.recipe(sp=sp, zero_stage=stage))
    assert config["zero_optimization"]["overlap_comm"] == (sp == 1 and stage >= 2)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:99"}])
def test_the_allocator_takes_the_setting_after_torch_and_deepspeed_were_imported(given: dict[str, str]) -> None:
    code = (
        "import torch; from molmo2.training.engine import let_segments_grow; let_segments_grow(); "
        "print('settings:', torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | given
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = next(iter(given.values()), "expandable_segments:True")
    assert run.stdout.splitlines()[-1].strip() == f"settings: {expected}".strip()


def test_a_user_may_add_buffers_and_nothing_that_the_recipe_decides(tmp_path: Path) -> None:
    path, recipe = tmp_path / "ds.json", engine_cases.recipe()
    assert deepspeed_config(recipe, added=read_engine_keys(None)) == deepspeed_config(recipe)
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": true}}')
    config = deepspeed_config(recipe, added=read_engine_keys(path))
    assert config["zero_optimization"] == deepspeed_config(recipe)["zero_optimization"] | {"reduce_bucket_size": 1000}
    assert config["comms_logger"] == {"enabled": True} and config["gradient_clipping"] == 0.0
    path.write_text('{"zero_optimization": {"stage": 3}, "optimizer": {}, "gradient_clipping": 1.0}')
    with pytest.raises(
        ValueError, match=r"ds.json: optimizer, gradient_clipping, zero_optimization\.stage: the recipe"
    ):
        read_engine_keys(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="write a JSON object"):
        read_engine_keys(path)
