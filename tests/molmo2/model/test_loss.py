"""The loss in chunks equals the plain formula, values and gradients, and calls the head once as a module."""

import functools

import pytest
import torch

from molmo2.model.loss import Head, LossSums, rows_per_chunk, weighted_loss

ROWS = 24


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, 8, generator=generator)
    labels = torch.randint(0, 17, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) > 0.4)
    head = Head(8, 17, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(17, 8, generator=generator))
    return hidden.requires_grad_(), labels, weights, head


def sums_of(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    head: Head,
    chunk_rows: int = 5,
    **options: object,
) -> LossSums:
    """The sums, computed inside one call of the head."""
    settings = {"z_loss": 1e-2, "chunk_rows": chunk_rows} | options
    return head(hidden, functools.partial(weighted_loss, labels=labels, weights=weights, **settings))


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_equals_the_plain_formula(chunk_rows: int) -> None:
    hidden, labels, weights, head = inputs()
    sums = sums_of(hidden, labels, weights, head, chunk_rows)
    (3 * (sums.cross_entropy + sums.z)).backward()
    got = [sums.cross_entropy, sums.z, hidden.grad, head.weight.grad]

    hidden, labels, weights, head = inputs()
    logits = head(hidden)
    ce = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
    z = 1e-2 * (weights * logits.logsumexp(-1).square()).sum()
    (3 * (ce + z)).backward()
    for have, want in zip(got, [ce, z, hidden.grad, head.weight.grad], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_every_dataset_has_its_own_sum() -> None:
    hidden, labels, weights, head = inputs()
    datasets = torch.arange(ROWS) % 3
    sums = sums_of(hidden, labels, weights, head, datasets=datasets, num_datasets=4)
    alone = [sums_of(hidden, labels, weights * (datasets == number), head) for number in range(4)]
    assert not sums.dataset_loss.requires_grad
    torch.testing.assert_close(sums.dataset_loss, torch.stack([one.cross_entropy for one in alone]).detach())
    torch.testing.assert_close(sums.dataset_weight[:3], torch.stack([weights[datasets == n].sum() for n in range(3)]))
    assert (sums.dataset_loss[3], sums.dataset_weight[3]) == (0, 0)


@pytest.mark.parametrize("rows", [1, 5, 6, ROWS])
def test_the_module_is_called_once_and_its_chunks_are_recomputed_without_it(rows: int) -> None:
    """Under ZeRO-3 a call is a collective, and ranks have different numbers of rows."""
    hidden, labels, weights, head = inputs()
    calls, chunks = [], []
    head.register_forward_pre_hook(lambda module, arguments: calls.append(1))
    linear = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda x, *rest: chunks.append(len(x)) or linear(x, *rest))
        sums = sums_of(hidden[:rows], labels[:rows], weights[:rows], head)
        expected = [5] * (rows // 5) + [rows % 5] * (rows % 5 > 0)
        assert chunks == expected
        (sums.cross_entropy + sums.z).backward()
    assert sorted(chunks) == sorted(2 * expected)
    assert len(calls) == 1


def test_rows_without_weight_give_zero_that_is_connected() -> None:
    hidden, labels, weights, head = inputs()
    sums = sums_of(hidden, labels, weights * 0, head)
    (sums.cross_entropy + sums.z).backward()
    assert sums.cross_entropy == 0
    assert sums.z == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert hidden.grad is not None


def test_half_precision_sums_in_float32() -> None:
    hidden, labels, weights, head = inputs()
    exact = sums_of(hidden, labels, weights, head)
    half = sums_of(hidden.bfloat16(), labels, weights, head.bfloat16())
    assert half.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(half.cross_entropy, exact.cross_entropy, rtol=2e-2, atol=0)


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert rows_per_chunk(152_064) == 588
    assert rows_per_chunk(10**12) == 1
