"""Visual tokens first: a step is what it is in the other order, on one rank and on two that share a pack."""

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.visual_first import TOKENS, visual_first
from molmo2.training.engine import TrainingModule

BATCHES = [engine_cases.batch(seed, visuals, 96) for seed, visuals in ((1, 2), (2, 3), (3, 0))]


def test_tokens_move_together_and_visual_ones_stand_first_in_the_trunk() -> None:
    for batch in BATCHES:
        moved, order = visual_first(batch)
        assert all(torch.equal(getattr(moved, name), getattr(batch, name).gather(1, order.long())) for name in TOKENS)
        assert torch.equal(order.sort(1).values, torch.arange(96, dtype=torch.int32).expand_as(order))
        patches = [one.input_ids[one.is_visual] for one in (batch, moved)]
        assert torch.equal(*patches)  # in the order of their features
        for segments, visual in zip(moved.segment_ids, moved.is_visual, strict=True):
            for segment in segments.unique():
                own = visual[segments == segment].int()
                assert (own.diff() <= 0).all()


def gradients(visual_first: bool) -> list[tuple[float, dict[str, Tensor]]]:
    module = TrainingModule(engine_cases.model(), engine_cases.recipe(visual_first=visual_first), SINGLE).train()
    results = []
    for batch in BATCHES:
        module.zero_grad()
        loss, _ = module(module.place(batch), 3)
        loss.backward()
        parameters = module.model.named_parameters()
        results.append((loss.item(), {name: p.grad for name, p in parameters if p.grad is not None}))
    return results


def test_a_step_is_the_same() -> None:
    for (loss, wanted), (found_loss, found) in zip(gradients(False), gradients(True), strict=True):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        largest = max(gradient.abs().max() for gradient in wanted.values())
        assert all((found[name] - gradient).abs().max() <= 1e-5 * largest for name, gradient in wanted.items())


@pytest.mark.dist
def test_the_engine_s_gradients_are_the_same() -> None:
    plain = TrainingModule(engine_cases.model(), engine_cases.recipe(), SINGLE).train()
    for case in engine_cases.BATCHES:
        plain(plain.place(engine_cases.make(case)))[0].backward()
    wanted = {name: parameter.grad for name, parameter in plain.model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for rank in run_ranks(2, engine_cases.gradients_of_visual_first, [(2, 2), (3, 2), (2, 1)]):
        for found in rank:
            for name, gradient in wanted.items():
                assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name
