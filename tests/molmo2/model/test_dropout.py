"""Residual dropout: the right share, unchanged expectation, and masks that hang on a token's place alone."""

from dataclasses import replace

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from molmo2.model.dropout import BLOCK, Dropout, mixed
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import TrainingModule

LENGTH, WIDTH = BLOCK + 300, 64


def kept(rates: Tensor, packs: tuple[int, ...], place: int = 0, start: int = 0) -> Tensor:
    """What the dropout makes of ones."""
    return Dropout(rates=rates, packs=packs, start=start)(torch.ones(*rates.shape, WIDTH), place)


def test_the_share_is_right_and_the_mean_stays() -> None:
    out = kept(torch.full((2, LENGTH), 0.1), (1, 2))
    assert (out == 0).float().mean() == pytest.approx(0.1, abs=0.005)
    assert out.mean() == pytest.approx(1, abs=0.005)
    assert (out[0] == out[1]).float().mean() == pytest.approx(0.9**2 + 0.1**2, abs=0.01)  # rows share nothing
    blocks = out[0, :300] == out[0, BLOCK:]
    assert blocks.float().mean() == pytest.approx(0.9**2 + 0.1**2, abs=0.01)


def test_only_tokens_with_a_rate_are_touched() -> None:
    rates = torch.tensor([[0.0, 0.5, 0.0]])
    out = kept(rates, (3,))
    assert (out[0, 0] == 1).all() and (out[0, 2] == 1).all()
    assert set(out[0, 1].tolist()) == {0.0, 2.0}


def test_a_mask_hangs_on_pack_place_and_token_alone() -> None:
    rates = torch.full((1, LENGTH), 0.3)
    whole, torch_state = kept(rates, (5,)), torch.get_rng_state()
    assert torch.equal(whole, kept(rates, (5,)))
    assert torch.equal(torch_state, torch.get_rng_state())
    for cut in (7, BLOCK - 1, BLOCK, BLOCK + 1):
        parts = [kept(rates[:, :cut], (5,)), kept(rates[:, cut:], (5,), start=cut)]
        assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[0], kept(rates.expand(2, -1), (4, 5))[1])  # whatever shares the micro-batch
    assert not torch.equal(whole, kept(rates, (5,), place=1))
    assert not torch.equal(whole, kept(rates, (6,)))
    assert mixed(1, 2, 3) == mixed(1, 2, 3) != mixed(1, 23)
    assert 0 <= mixed(-1) < 2**63


def test_training_draws_by_step_and_slot_and_evaluation_does_not() -> None:
    batch = engine_cases.make(engine_cases.BATCHES[0])
    module = TrainingModule(engine_cases.model(), engine_cases.recipe(residual_dropout=0.2), SINGLE).train()
    losses = [
        module(module.place(one))[0].item()
        for one in (batch, batch, replace(batch, step=1), replace(batch, slots=(1,)))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    plain = TrainingModule(engine_cases.model(), engine_cases.recipe(), SINGLE).train()
    assert module.eval()(module.place(batch))[0].item() == plain(plain.place(batch))[0].item() not in losses
    response = engine_cases.recipe(residual_dropout=0.2, dropout_on="response")
    rates = TrainingModule(engine_cases.model(), response, SINGLE)._dropout(batch, slice(0, 48))
    assert rates is not None and torch.equal(rates.rates > 0, batch.loss_weights > 0)


@pytest.mark.dist
def test_ranks_that_share_a_pack_drop_what_one_rank_drops() -> None:
    alone = TrainingModule(engine_cases.model(), engine_cases.recipe(residual_dropout=0.2), SINGLE).train()
    ranks = run_ranks(2, engine_cases.gradients, (True, (6, 3), 0.2))
    for number, case in enumerate(engine_cases.BATCHES):
        alone.zero_grad()
        loss, logged = alone(alone.place(engine_cases.make(case)))
        loss.backward()
        largest = max(p.grad.abs().max() for p in alone.parameters() if p.grad is not None)
        for rank in ranks:
            torch.testing.assert_close(
                rank[number][0], torch.cat([value.flatten() for value in logged]), rtol=1e-5, atol=1e-7
            )
            for name, parameter in alone.model.named_parameters():
                assert parameter.grad is not None
                assert (rank[number][1][name] - parameter.grad).abs().max() <= 1e-5 * max(largest, 1e-9), name
