"""The model by itself: who sees whom, generation, sizes, presets, start."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from packed_rows import build, image
from tiny_models import CONFIGS, QWEN, noisy_model

import molmo2.model.recompute
from molmo2.model.generate import GREEDY, PromptTensors, Sampling, generate
from molmo2.model.mask import PAD_SEGMENT, TRUNK, AttentionMask
from molmo2.model.molmo2 import Molmo2, inference_dtype
from molmo2.model.presets import PRESETS, ModelConfig

# --- the mask --------------------------------------------------------------------------------------------------------


def sees(segments: list[int], visual: list[bool], query: int, key: int) -> bool:
    """The rule in words, token by token."""
    if query == key:
        return True
    if PAD_SEGMENT in (segments[query], segments[key]):
        return False
    (member, branch), (their_member, their_branch) = (divmod(segments[i], 100_000) for i in (query, key))
    if member != their_member:
        return False
    if their_branch != branch and their_branch != TRUNK:
        return False
    return key <= query or (visual[query] and visual[key])


@pytest.mark.parametrize("seed", range(30))
def test_mask_is_the_rule_of_every_pair(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    segments: list[int] = []
    visual: list[bool] = []
    for member in range(1 + draw(3)):
        trunk = 1 + draw(6)
        segments += [member * 100_000 + TRUNK] * trunk
        visual += [draw(2) == 1 for _ in range(trunk)]
        for branch in range(1, 1 + draw(4)):
            length = 1 + draw(3)
            segments += [member * 100_000 + branch] * length
            visual += [False] * length
    padding = draw(4)
    segments, visual = segments + [PAD_SEGMENT] * padding, visual + [False] * padding
    expected = [[sees(segments, visual, q, k) for k in range(len(segments))] for q in range(len(segments))]
    mask = AttentionMask(torch.tensor([segments], dtype=torch.int32), torch.tensor([visual]))
    assert mask.dense()[0, 0].tolist() == expected


# --- generation ------------------------------------------------------------------------------------------------------


def prompts_of(config: ModelConfig) -> list[PromptTensors]:
    cases = [([], [7]), ([image(2, 1)], [5]), ([{"kind": "frame"}] * 3, [12])]
    rows = [build(config, [case]) for case in cases]  # type: ignore[list-item]
    return [
        PromptTensors(
            input_ids=row["input_ids"][0],
            is_visual=row["is_visual"][0],
            pixels=row["pixels"],
            pooling=row["pooling"],
        )
        for row in rows
    ]


def without_cache(model: Molmo2, prompt: PromptTensors, num_tokens: int) -> list[int]:
    """Every token from a full forward of everything before it, alone in its batch."""
    ids, visual = prompt.input_ids[None], prompt.is_visual[None]
    for _ in range(num_tokens):
        positions, segments = torch.arange(ids.shape[1])[None], torch.full_like(ids, TRUNK)
        with torch.no_grad():
            logits = model(ids, positions, segments, visual, prompt.pixels, prompt.pooling)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        visual = torch.nn.functional.pad(visual, (0, 1))
    return ids[0, -num_tokens:].tolist()


@pytest.mark.parametrize("variant", CONFIGS)
def test_cache_and_batch_change_no_token(variant: str) -> None:
    model = noisy_model(CONFIGS[variant])
    prompts = prompts_of(model.config)
    expected = [without_cache(model, prompt, 10) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == 3
    assert generate(model, prompts, 10, eos_id=-1) == expected
    assert generate(model, prompts[:1], 10, eos_id=-1) == expected[:1]


def test_generation_stops_at_eos_in_every_row() -> None:
    model = noisy_model()
    prompts = prompts_of(model.config)
    free = generate(model, prompts, 10, eos_id=-1)
    eos = free[1][3]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert any(len(row) < 10 for row in expected)
    assert generate(model, prompts, 10, eos) == expected
    assert generate(model, prompts[1:2], 10_000, eos) == expected[1:2]  # ends by itself


def test_eos_at_once_is_an_empty_answer() -> None:
    model = noisy_model()
    prompt = prompts_of(model.config)[:1]
    first = generate(model, prompt, 1, eos_id=-1)[0][0]
    assert generate(model, prompt, 5, first) == [[]]


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", None, torch.float32),
        ("cuda", None, torch.bfloat16),
        (torch.device("cuda:3"), None, torch.bfloat16),
        ("cuda", "fp32", torch.float32),
        ("cpu", "bf16", torch.bfloat16),
    ],
)
def test_a_gpu_answers_in_bfloat16_unless_asked_otherwise(
    device: torch.device | str, precision: str | None, dtype: torch.dtype
) -> None:
    assert inference_dtype(device, precision) == dtype


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision 'fp16': choose one of bf16, fp32"):
        inference_dtype("cpu", "fp16")


def test_the_precision_of_inference_leaves_the_weights_as_they_are() -> None:
    weights = {name: tensor.detach() for name, tensor in noisy_model().named_parameters()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = Molmo2.for_inference(QWEN, weights, "cpu", "bf16")
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    other = Molmo2.for_inference(QWEN, weights, "meta")  # like a GPU, it is no CPU
    assert {(parameter.dtype, parameter.device.type) for parameter in other.parameters()} == {(torch.bfloat16, "meta")}


def test_a_bfloat16_model_answers_on_a_cpu() -> None:
    model = noisy_model()
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    half, prompts = Molmo2.for_inference(QWEN, weights, "cpu", "bf16"), prompts_of(QWEN)
    answers, drawn = (generate(half, prompts, 8, -1, sampling) for sampling in (GREEDY, Sampling(temperature=1.0)))
    assert [len(row) for row in answers + drawn] == [8] * 6
    wide = generate(Molmo2.for_inference(QWEN, weights, "cpu"), prompts, 8, -1)
    assert [row[0] for row in answers] == [row[0] for row in wide]


def test_prompt_tensors_come_from_arrays() -> None:
    prompt = prompts_of(QWEN)[1]
    arrays = PromptTensors(**{name: getattr(prompt, name).numpy() for name in PromptTensors.__slots__})
    again = PromptTensors.of(arrays)
    assert again.input_ids.dtype == torch.int64 and torch.equal(again.pixels, prompt.pixels)


# --- sizes -----------------------------------------------------------------------------------------------------------

COUNTS = {  # of the released models: connector, everything
    "4b": (56_611_328, 4_850_869_200),
    "8b": (87_937_536, 8_661_703_120),
    "o-7b": (79_745_536, 7_760_786_896),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_presets_have_the_released_sizes(name: str) -> None:
    with torch.device("meta"):
        model = Molmo2(PRESETS[name])
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert count["vit"] == 382_505_936
    assert (count["connector"], sum(count.values())) == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert ModelConfig.from_json(json.loads(json.dumps(preset.to_json()))) == preset


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ("text", {"qk_norm": "none"}, "qk_norm 'none'"),
        ("vit", {"feature_layers": (4, 1)}, r"feature_layers \(4, 1\)"),
        ("connector", {"num_heads": 5}, "hidden_size 32 is not a multiple of num_heads 5"),
    ],
)
def test_impossible_sizes_are_named(part: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(getattr(QWEN, part), **change)


def test_groups_hold_every_parameter_once() -> None:
    model = Molmo2(QWEN)
    groups = model.parameter_groups()
    listed = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    assert any(parameter is model.text.embedding.added for parameter in groups["connector"])
    assert any(parameter is model.lm_head.weight for parameter in groups["llm"])


# --- start and arithmetic --------------------------------------------------------------------------------------------


def test_init_is_seeded_and_scaled_by_fan_in() -> None:
    first, again, other = (dict(Molmo2(QWEN).init_weights(seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert not torch.equal(parameter, other[name])
            tables = {
                "vit.positions": 1.5,
                "text.embedding.base": 0.5,
                "text.embedding.added": 0.5,
                "lm_head.weight": 0.02,
            }
            expected = tables.get(name, parameter.shape[-1] ** -0.5)
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


@pytest.mark.parametrize("frozen", [(), ("vit.", "connector.", "text.embedding.")])
def test_recomputation_changes_no_gradient(frozen: tuple[str, ...]) -> None:
    model = noisy_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    row = build(QWEN, [([image(1, 2)], [5, 7])])
    gradients = []
    for level, offload in (("none", False), ("light", False), ("full", False), ("full", True)):
        model.set_recompute(level, offload=offload)
        model.zero_grad()
        model(**row).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == sum(parameter.requires_grad for parameter in model.parameters())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and torch.equal(gradient, gradients[2][name]), name
        torch.testing.assert_close(
            gradients[3][name], gradient, rtol=1e-4, atol=1e-7, msg=name
        )  # added up in another order


def test_offloaded_inputs_of_layers_go_through_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []

    class Spy(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: moved.append(tensor.shape) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(molmo2.model.recompute, "save_on_cpu", Spy)
    model = noisy_model().train()
    model.set_recompute("full", offload=True)
    row = build(QWEN, [([image(1, 2)], [5, 7])])
    model(**row).square().mean().backward()
    width = row["input_ids"].shape[1]
    layers, blocks = model.config.text.num_layers, model.config.vit.num_layers
    assert moved.count(torch.Size([1, width, model.config.text.hidden_size])) == layers
    assert len(moved) == layers + blocks


def test_chunks_of_crops_change_no_gradient() -> None:
    model = noisy_model().train()
    row = build(QWEN, [([image(1, 2), image(2, 2)], [5, 7])])
    crops = row["pixels"].shape[0]
    gradients = []
    for chunk in (None, 1, crops - 1, crops, crops + 1):
        model.set_recompute("full", chunk)
        model.zero_grad()
        model(**row).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert crops > 2
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_is_close() -> None:
    model = noisy_model()
    row = build(QWEN, [([image(1, 2)], [5, 7])])
    exact = model(**row)
    rough = model.bfloat16()(**row)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_text_alone_needs_no_crop() -> None:
    row = build(QWEN, [([], [5])])
    assert row["pixels"].shape[0] == 0
    assert noisy_model()(**row).isfinite().all()
