"""Rows with loss are shared out evenly, and the loss and its gradients stay those of one rank."""

import parallel_cases
import pytest
import torch
from ranks import run_ranks

from molmo2.model.loss import weighted_loss
from molmo2.parallel.loss_rows import split_loss_rows
from molmo2.parallel.mesh import SINGLE


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_shared_rows_give_the_loss_of_one_rank(world: int) -> None:
    ranks = run_ranks(world, parallel_cases.loss_rows, parallel_cases.ROW_CASES)
    for name, places in parallel_cases.ROW_CASES.items():
        hidden, head, labels, weights = parallel_cases.row_inputs(places)
        hidden.requires_grad_()
        head.requires_grad_()
        whole = sum(weighted_loss(hidden, labels, weights, lambda x, head=head: x @ head.T, 1e-4, chunk_rows=100)[:2])
        whole.backward()
        counts = [rank[name][0] for rank in ranks]
        assert sum(counts) == len(places)
        assert max(counts) == -(-len(places) // world)
        torch.testing.assert_close(sum(rank[name][1] for rank in ranks), whole.detach())
        torch.testing.assert_close(torch.cat([rank[name][2] for rank in ranks], dim=1), hidden.grad)
        torch.testing.assert_close(sum(rank[name][3] for rank in ranks), head.grad)


def test_one_rank_keeps_its_rows_in_order() -> None:
    hidden, _, labels, weights = parallel_cases.row_inputs(parallel_cases.ROW_CASES["everywhere"])
    rows = split_loss_rows(hidden, labels, weights, labels, SINGLE)
    assert torch.equal(rows.hidden, hidden.flatten(0, 1))
    assert torch.equal(rows.labels, labels.flatten())
    assert torch.equal(rows.weights, weights.flatten())


def test_without_any_loss_one_idle_row_is_left() -> None:
    hidden, _, labels, weights = parallel_cases.row_inputs([])
    rows = split_loss_rows(hidden, labels, weights, labels, SINGLE)
    assert rows.hidden.shape == (1, parallel_cases.WIDTH)
    assert rows.weights.tolist() == [0]
