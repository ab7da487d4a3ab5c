"""The loss over rows with weight equals the plain formula over all rows, values and gradients."""

import pytest
import torch

from molmo2.model.loss import rows_per_chunk, weighted_loss


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 12, 8, generator=generator)
    labels = torch.randint(0, 17, (2, 12), generator=generator)
    weights = torch.rand(2, 12, generator=generator) * (torch.rand(2, 12, generator=generator) > 0.4)
    head = torch.nn.Linear(8, 17, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(17, 8, generator=generator))
    return hidden.requires_grad_(), labels, weights, head


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
@pytest.mark.parametrize("num_chunks", [1, 40])
def test_equals_the_plain_formula(chunk_rows: int, num_chunks: int) -> None:
    hidden, labels, weights, head = inputs()
    sums = weighted_loss(hidden, labels, weights, head, 1e-2, chunk_rows, num_chunks)
    (3 * (sums.cross_entropy + sums.z)).backward()
    got = [sums.cross_entropy, sums.z, hidden.grad, head.weight.grad]

    hidden, labels, weights, head = inputs()
    logits = head(hidden)
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    ce = (flat * weights.flatten()).sum()
    z = 1e-2 * (weights * logits.logsumexp(-1).square()).sum()
    (3 * (ce + z)).backward()
    for have, want in zip(got, [ce, z, hidden.grad, head.weight.grad], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_every_dataset_has_its_own_sum() -> None:
    hidden, labels, weights, head = inputs()
    datasets = torch.arange(24).view(2, 12) % 3
    sums = weighted_loss(hidden, labels, weights, head, 0.0, 5, datasets=datasets, num_datasets=4)
    alone = [weighted_loss(hidden, labels, weights * (datasets == number), head, 0.0, 5) for number in range(4)]
    assert not sums.dataset_loss.requires_grad
    torch.testing.assert_close(sums.dataset_loss, torch.stack([one.cross_entropy for one in alone]).detach())
    torch.testing.assert_close(sums.dataset_weight[:3], torch.stack([weights[datasets == n].sum() for n in range(3)]))
    assert (sums.dataset_loss[3], sums.dataset_weight[3]) == (0, 0)


def test_rows_without_weight_are_never_computed() -> None:
    hidden, labels, weights, head = inputs()
    seen = 0

    def counting(rows: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(rows)
        return head(rows)

    weighted_loss(hidden, labels, weights, counting, 0.0, 4)
    assert 0 < seen == int((weights > 0).sum()) < 24


def test_no_row_at_all_gives_zero_that_is_connected() -> None:
    hidden, labels, weights, head = inputs()
    sums = weighted_loss(hidden, labels, weights * 0, head, 1e-4, 7, 3)
    (sums.cross_entropy + sums.z).backward()
    assert sums.cross_entropy == 0
    assert sums.z == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert hidden.grad is not None


def test_half_precision_sums_in_float32() -> None:
    hidden, labels, weights, head = inputs()
    exact = weighted_loss(hidden, labels, weights, head, 1e-4, 5)
    half = weighted_loss(hidden.bfloat16(), labels, weights, head.bfloat16(), 1e-4, 5)
    assert half.cross_entropy.dtype == torch.float32
    torch.testing.assert_close(half.cross_entropy, exact.cross_entropy, rtol=2e-2, atol=0)


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert rows_per_chunk(152_064) == 588
    assert rows_per_chunk(10**12) == 1
