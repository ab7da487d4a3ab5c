"""Residual dropout: the right share, unchanged expectation, and masks that hang on an element's place alone."""

from dataclasses import replace

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from molmo2.model.dropout import Dropout, seed_words
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import TrainingModule

LENGTH, WIDTH = 1324, 64


def kept(rates: Tensor, packs: tuple[int, ...], place: int = 0, start: int = 0, width: int = WIDTH) -> Tensor:
    """What the dropout makes of ones, in a run of seed 7 at step 3."""
    seeds = seed_words((7, 3, pack) for pack in packs)
    dropout = Dropout(rates=rates, seeds=seeds, start=start)
    return dropout(torch.ones(*rates.shape, width), dropout.keys(place + 1)[place])


def test_the_share_is_right_and_the_mean_stays() -> None:
    for rate in (0.01, 0.1, 0.5, 0.9):
        out = kept(torch.full((2, LENGTH), rate), (1, 2))
        bound = 5 * (rate * (1 - rate) / out.numel()) ** 0.5  # five standard deviations
        assert (out == 0).float().mean() == pytest.approx(rate, abs=bound)
        assert out.mean() == pytest.approx(1, abs=bound / (1 - rate))


def dropped(seed: int = 7, step: int = 3, pack: int = 0, place: int = 0) -> Tensor:
    """Which elements of a pack are dropped, as numbers with mean 0 and variance 1."""
    rates = torch.full((1, LENGTH), 0.5)
    dropout = Dropout(rates=rates, seeds=seed_words([(seed, step, pack)]))
    return torch.where(dropout(torch.ones(1, LENGTH, WIDTH), dropout.keys(place + 1)[place])[0] == 0, 1.0, -1.0)


def test_masks_are_independent() -> None:
    """Correlations of two masks, and of every two tokens and channels of one, are those of fair coins."""
    masks = [dropped()]
    masks += [dropped(place=place) for place in range(1, 73)]  # the sublayers of 36 layers
    masks += [dropped(step=step) for step in range(4, 12)] + [dropped(seed=seed) for seed in (8, 9, 7 + 2**31)]
    masks += [dropped(pack=pack) for pack in range(1, 9)]
    flat = torch.stack([mask.flatten() for mask in masks])
    for rows in (flat, masks[0], masks[0].T, masks[40].T, flat[:, :WIDTH], flat[:, ::WIDTH]):
        correlations = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0) * rows.shape[1] ** 0.5
        pairs = len(rows) * (len(rows) - 1) / 2
        assert correlations.abs().max() < 2 + (2 * torch.tensor(2 * pairs).log()).sqrt()  # in standard deviations
        assert correlations.square().sum() / (2 * pairs) == pytest.approx(1, abs=10 / pairs**0.5)


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 128, 1024])
def test_a_mask_does_not_repeat_at_a_distance(distance: int) -> None:
    """Neither does it with its channels in another order, as it would if token and channel were added up."""
    mask = dropped()
    one, other = mask[:-distance], mask[distance:]
    for turned in (other, other.roll(distance, 1), other.roll(-distance, 1), other.flip(1), -other):
        assert (one * turned).mean().abs() * one.numel() ** 0.5 < 5


def reference(x: int, added: int = 0) -> int:
    """The mixer in Python's integers."""
    x = ((x ^ x >> 16) * 0x7FEB352D + added) % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_every_device_computes_these_integers() -> None:
    """The mask is that of exact arithmetic modulo 2^32, which no device does otherwise."""
    words = [int(word) % 2**32 for word in seed_words([(7, 3, 5)])[0]]
    out = kept(torch.full((1, 9), 0.3), (5,), place=11, start=70_000, width=2560)
    keys = [reference(word ^ 12 * 0x2545F491 % 2**31) for word in words]
    for token in (0, 8):
        rows = [reference(reference((key + 70_000 + token) % 2**32) ^ keys[1 - i]) for i, key in enumerate(keys)]
        for channel in (0, 1, 700, 2559):
            bits = reference(rows[0] ^ reference(channel * 0x5BD1E995 % 2**32), rows[1])
            assert (out[0, token, channel] == 0) == (bits % 2**31 < 0.3 * 2**31)


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
    for cut in (1, 7, 1024):
        parts = [kept(rates[:, :cut], (5,)), kept(rates[:, cut:], (5,), start=cut)]
        assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[0], kept(rates.expand(2, -1), (4, 5))[1])  # whatever shares the micro-batch
    assert not torch.equal(whole, kept(rates, (5,), place=1))
    assert not torch.equal(whole, kept(rates, (6,)))
    assert torch.equal(seed_words([(1, 2, 3)]), seed_words([(1, 2, 3)]))
    assert not torch.equal(seed_words([(1, 2, 3)]), seed_words([(1, 23)]))


def test_one_graph_holds_the_dropout() -> None:
    """For every length and micro-batch."""
    torch._dynamo.reset()
    compiled = torch.compile(Dropout.__call__, backend="eager", fullgraph=True, dynamic=True)
    for length in (48, 64, 96):
        dropout = Dropout(rates=torch.full((2, length), 0.2), seeds=seed_words([(1, length), (2, length)]))
        x = torch.randn(2, length, 8)
        keys = dropout.keys(4)[3]
        assert torch.equal(compiled(dropout, x, keys), dropout(x, keys))


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
    rates = TrainingModule(engine_cases.model(), response, SINGLE)._dropout(module.place(batch), slice(0, 48))
    assert rates is not None and torch.equal(rates.rates > 0, batch.loss_weights > 0)


@pytest.mark.dist
def test_ranks_that_share_a_pack_drop_what_one_rank_drops() -> None:
    alone = TrainingModule(engine_cases.model(), engine_cases.recipe(residual_dropout=0.2), SINGLE).train()
    ranks = run_ranks(2, engine_cases.gradients, ("full", (6, 3), 0.2))
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
