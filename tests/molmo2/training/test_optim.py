"""Schedule and clipping by component, against the textbook."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from molmo2.config import Optim, OptimGroup
from molmo2.training.optim import ComponentAdamW, learning_rate, parameter_groups, set_learning_rates

OPTIM = Optim(
    vit=OptimGroup(lr=1e-3, warmup_steps=4, clip=0.05),
    connector=OptimGroup(lr=2e-3, warmup_steps=0, clip=0.3),
    llm=OptimGroup(lr=5e-3, warmup_steps=2, clip=100.0),
)


def components(seed: int = 0) -> dict[str, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
        for name in ("vit", "connector", "llm")
    }


def test_schedule_warms_up_then_falls_to_the_final_fraction() -> None:
    group = OptimGroup(lr=2.0, warmup_steps=10)
    rates = [learning_rate(group, step, 110, 0.1) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half-way down the cosine
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(OptimGroup(lr=2.0, warmup_steps=0), 1, 1, 0.1) == pytest.approx(0.2)
    fraction = OptimGroup(lr=2.0, warmup_steps=99, warmup_fraction=0.1)
    assert [learning_rate(fraction, step, 100, 0.1) for step in range(1, 101)] == [
        learning_rate(OptimGroup(lr=2.0, warmup_steps=10), step, 100, 0.1) for step in range(1, 101)
    ]


def test_a_fused_update_moves_numbers_of_steps_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted checkpoint has them on the CPU, which the fused kernel refuses; the GPU has no values here."""
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda value: True)  # the norm is finite
    with FakeTensorMode(), torch.device("cuda"):
        parameter = torch.nn.Parameter(torch.ones(3))
        groups = [{"params": [parameter], "name": "llm", "max_norm": 1.0}]
        optimizer = ComponentAdamW(groups, partitioned=False, fused=True)
        for _ in range(2):
            parameter.grad = torch.ones(3)
            optimizer.step()
            assert optimizer.state[parameter]["step"].device.type == "cuda"
            optimizer.state[parameter]["step"] = torch.ones((), device="cpu")


@pytest.mark.parametrize("fused", [False, True])
def test_clips_each_component_to_its_own_norm(fused: bool) -> None:
    ours, theirs = components(), components()
    optimizer = ComponentAdamW(
        parameter_groups(ours, OPTIM), partitioned=False, betas=OPTIM.betas, eps=OPTIM.eps, fused=fused
    )
    references = {name: torch.optim.AdamW(theirs[name], betas=OPTIM.betas, eps=OPTIM.eps) for name in theirs}
    for step in range(1, 4):
        rates = set_learning_rates(optimizer, ["vit", "connector", "llm"], OPTIM, step, 10)
        generator = torch.Generator().manual_seed(step)
        for name in ours:
            for mine, other in zip(ours[name], theirs[name], strict=True):
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.clone()
            norm = torch.nn.utils.clip_grad_norm_(theirs[name], getattr(OPTIM, name).clip)
            references[name].param_groups[0].update(lr=rates[name], weight_decay=0.0)
            references[name].step()
            assert norm > 0.3  # so that two of the three limits bind
            ours[name][0].expected_norm = norm  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        optimizer.step()
        for name in ours:
            torch.testing.assert_close(optimizer.norms[name], ours[name][0].expected_norm)  # type: ignore[attr-defined]
            for mine, other in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("faulty", ["vit", "connector", "llm"])
def test_a_faulty_component_is_reported_whichever_comes_last(faulty: str) -> None:
    """As under ZeRO-3: one call of `step` for each component, with the gradients of that component alone."""
    parts = components()
    optimizer = ComponentAdamW(parameter_groups(parts, OPTIM), partitioned=False, lr=1e-2)
    before = {name: [p.clone() for p in parts[name]] for name in parts}
    for scale in (float("nan"), 1.0):
        optimizer.begin()
        for name in parts:
            for parameter in parts[name]:
                parameter.grad = torch.full_like(parameter, scale if name == faulty else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.step()
            for parameter in parts[name]:
                parameter.grad = None
        assert optimizer.refused == (scale != 1.0)
        changed = {name for name in parts if not torch.equal(parts[name][0], before[name][0])}
        assert changed == (set(list(parts)[: list(parts).index(faulty)]) if optimizer.refused else set(parts))


def test_frozen_parameters_and_components_are_left_out() -> None:
    parts = components()
    parts["llm"][0].requires_grad_(False)
    for parameter in parts["vit"]:
        parameter.requires_grad_(False)
    groups = parameter_groups(parts, OPTIM)
    assert [(group["name"], len(group["params"]), group["max_norm"]) for group in groups] == [
        ("connector", 2, 0.3),
        ("llm", 1, 100.0),
    ]


def test_rates_are_set_by_index_even_if_a_checkpoint_changed_the_groups() -> None:
    optimizer = ComponentAdamW(parameter_groups(components(), OPTIM), partitioned=False)
    for group in optimizer.param_groups:
        group.update(lr=9.0, name="vit", max_norm=1e9)
    rates = set_learning_rates(optimizer, ["vit", "connector", "llm"], OPTIM, 1, 10)
    assert [group["lr"] for group in optimizer.param_groups] == list(rates.values())
    assert [group["name"] for group in optimizer.param_groups] == ["vit", "connector", "llm"]
    assert [group["max_norm"] for group in optimizer.param_groups] == [0.05, 0.3, 100.0]
    assert rates["vit"] == pytest.approx(1e-3 / 4)
    assert math.isclose(rates["llm"], 2.5e-3)
