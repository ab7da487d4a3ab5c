"""Sampling: the right distribution, seeds, and the greedy limit; streams equal whole answers."""

import itertools

import pytest
import torch
from tiny_models import QWEN, prompts, speaker

from molmo2.model.generate import Sampling, generate, nucleus, stream
from molmo2.model.molmo2 import Molmo2

EOS = -1  # no id: answers run to their end


@pytest.fixture(scope="module")
def model() -> Molmo2:
    return speaker()


def reference(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Nucleus sampling token by token, in plain floats."""
    powers = torch.tensor([value / temperature for value in logits], dtype=torch.float64).exp().tolist()
    probabilities = [power / sum(powers) for power in powers]
    kept, mass = set(), 0.0
    for index in sorted(range(len(logits)), key=lambda i: -probabilities[i]):
        kept.add(index)
        mass += probabilities[index]
        if mass >= top_p:
            break
    return [probability / mass if i in kept else 0.0 for i, probability in enumerate(probabilities)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (1.0, 1e-6), (0.01, 1.0)])
def test_tokens_are_drawn_from_the_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * 2
    found = nucleus(logits, Sampling(temperature=temperature, top_p=top_p))
    expected = torch.tensor([reference(row.tolist(), temperature, top_p) for row in logits])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_model(model: Molmo2) -> None:
    sampling = [Sampling(temperature=0.8, top_p=0.9, seed=seed) for seed in range(8)]
    batch = prompts(*[5] * 256)
    drawn = torch.tensor([row[0] for one in sampling for row in generate(model, batch, 1, EOS, one)])
    found = drawn.bincount(minlength=QWEN.text.vocab_size) / len(drawn)
    row = {
        "input_ids": batch[0].input_ids[None],
        "position_ids": torch.arange(5)[None],
        "segment_ids": torch.full((1, 5), 10_000, dtype=torch.int32),
        "is_visual": batch[0].is_visual[None],
        "pixels": batch[0].pixels,
        "pooling": batch[0].pooling,
    }
    with torch.no_grad():
        expected = nucleus(model(**row)[:, -1], sampling[0])[0]
    assert 2 < int((expected > 0.01).sum())  # there is something to draw
    assert not found[expected == 0].any()
    assert float((found - expected).abs().max()) < 4 * (0.25 / len(drawn)) ** 0.5


def test_seeds_repeat_and_differ(model: Molmo2) -> None:
    answers = [generate(model, prompts(4, 9), 12, EOS, Sampling(temperature=1.0, seed=seed)) for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


def test_a_cold_or_narrow_draw_is_greedy(model: Molmo2) -> None:
    greedy = generate(model, prompts(4, 9), 12, EOS)
    assert generate(model, prompts(4, 9), 12, EOS, Sampling(temperature=1e-4)) == greedy
    assert generate(model, prompts(4, 9), 12, EOS, Sampling(temperature=2.0, top_p=1e-9)) == greedy


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=5)])
def test_a_stream_gives_the_answer_as_it_comes(model: Molmo2, sampling: Sampling) -> None:
    whole = generate(model, prompts(4, 9), 12, EOS, sampling)
    first = list(itertools.islice(stream(model, prompts(4, 9), 12, EOS, sampling), 3))
    assert [list(row) for row in zip(*first, strict=True)] == [row[:3] for row in whole]


def test_an_ended_row_of_a_stream_repeats_eos(model: Molmo2) -> None:
    whole = generate(model, prompts(4, 9), 12, EOS)
    eos = whole[0][6]
    end, length = whole[0].index(eos), whole[1].index(eos) + 1 if eos in whole[1] else 12
    rows = list(zip(*stream(model, prompts(4, 9), 12, eos), strict=True))
    assert list(rows[0]) == whole[0][:end] + [eos] * (len(rows[0]) - end)
    assert list(rows[1])[:length] == whole[1][:length]
    assert len(rows[0]) == max(end + 1, length)


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_senseless_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"temperature .* and top_p"):
        Sampling(**values)  # type: ignore[arg-type]
