"""Rows with loss are shared out evenly, and the loss and its gradients stay those of one rank."""

from dataclasses import replace

import parallel_cases
import pytest
import torch
from ranks import run_ranks

from molmo2.parallel.gather import take_loss_rows
from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.places import find_loss_places


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_shared_rows_give_the_loss_of_one_rank(world: int) -> None:
    ranks = run_ranks(world, parallel_cases.loss_rows, parallel_cases.ROW_CASES)
    for name, places in parallel_cases.ROW_CASES.items():
        hidden, head, labels, weights = parallel_cases.row_inputs(places)
        hidden.requires_grad_()
        head.requires_grad_()
        whole = parallel_cases.loss_of(hidden, head, labels, weights, chunk_rows=100)
        whole.backward()
        counts = [rank[name][0] for rank in ranks]
        assert sum(counts) == len(places)
        assert max(counts) == -(-len(places) // world)
        torch.testing.assert_close(sum(rank[name][1] for rank in ranks), whole.detach())
        torch.testing.assert_close(torch.cat([rank[name][2] for rank in ranks], dim=1), hidden.grad)
        torch.testing.assert_close(sum(rank[name][3] for rank in ranks), head.grad)


def test_one_rank_keeps_its_rows_in_order() -> None:
    hidden, _, labels, weights = parallel_cases.row_inputs(parallel_cases.ROW_CASES["everywhere"])
    rows = find_loss_places(labels, weights, labels, SINGLE)
    assert torch.equal(take_loss_rows(hidden, rows, SINGLE), hidden.flatten(0, 1))
    assert torch.equal(rows.labels, labels.flatten())
    assert torch.equal(rows.weights, weights.flatten())


def test_rows_without_weight_are_never_computed() -> None:
    places = parallel_cases.ROW_CASES["all on the last rank"]
    hidden, _, labels, weights = parallel_cases.row_inputs(places)
    rows = find_loss_places(labels, weights, labels, SINGLE)
    assert torch.equal(take_loss_rows(hidden, rows, SINGLE), hidden[weights > 0])
    assert torch.equal(rows.labels, labels[weights > 0])
    assert rows.weights.tolist() == weights[weights > 0].tolist()


def test_a_rank_sends_no_row_twice_so_that_backward_adds_to_each_once() -> None:
    _, _, labels, weights = parallel_cases.row_inputs(parallel_cases.ROW_CASES["all on the last rank"])
    for rank in range(4):
        mesh = replace(SINGLE, rank=rank, world=4, sp=4)
        sent = find_loss_places(labels, weights, labels, mesh).sent.tolist()
        assert len(sent) == len(set(sent)) == 5, "the last rank's five rows give the size of every block"


def test_without_any_loss_one_idle_row_is_left() -> None:
    hidden, _, labels, weights = parallel_cases.row_inputs([])
    rows = find_loss_places(labels, weights, labels, SINGLE)
    assert take_loss_rows(hidden, rows, SINGLE).shape == (1, parallel_cases.WIDTH)
    assert rows.weights.tolist() == [0]
