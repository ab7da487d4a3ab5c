"""Costs: how ranks share a step, from their own times."""

import torch

from molmo2.training.cost import measured_balance


def test_the_measured_share_by_hand() -> None:
    seconds = torch.tensor([[4.0, 1.0], [2.0, 1.0]], dtype=torch.float64)  # 2 ranks, 2 micro-steps
    assert measured_balance(seconds) == {"working_share": 8 / (2 * (4 + 1)), "slowest_rank": 0}
    assert measured_balance(seconds[:1]) == {}
    assert measured_balance(torch.zeros(2, 1))["working_share"] == 0
