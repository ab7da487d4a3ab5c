"""Attention over a split sequence equals attention over the whole one, for even and uneven heads."""

import parallel_cases
import pytest
import torch
from ranks import run_ranks

from molmo2.parallel.mesh import SINGLE, MeshError, check_mesh
from molmo2.parallel.ulysses import plan_heads, ulysses

HEADS = [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (5, 1), (3, 3), (5, 5), (7, 1), (8, 2), (14, 2), (32, 8)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [*HEADS, (16, 8)])
def test_every_query_head_meets_its_key_head(ranks: int, num_heads: int, num_kv_heads: int) -> None:
    plan = plan_heads(num_heads, num_kv_heads, ranks)
    assert plan.query[:num_heads] == tuple(range(num_heads))
    assert len(plan.query) == ranks * plan.num_query
    for rank in range(ranks):
        keys = plan.key[rank * plan.num_key : (rank + 1) * plan.num_key]
        for i, head in enumerate(plan.query[rank * plan.num_query : (rank + 1) * plan.num_query]):
            position = plan.local[rank][i] if plan.local else i * plan.num_key // plan.num_query
            assert keys[position] == head // (num_heads // num_kv_heads)


def test_even_splits_need_no_selection() -> None:
    assert all(plan_heads(32, 8, ranks).local is None for ranks in (1, 2, 4, 8, 16, 32))
    assert plan_heads(6, 3, 2).local is not None


def test_without_sequence_parallelism_nothing_is_wrapped() -> None:
    assert ulysses(parallel_cases.attend, SINGLE, 4, 2) is parallel_cases.attend


def test_mesh_tells_every_broken_rule_with_all_numbers() -> None:
    check_mesh(world=8, sp=2, packs_per_step=16, micro_batch=2, num_heads=8)
    with pytest.raises(MeshError, match=r"multiple of train\.sp.*whole heads.*ranks 6, train\.sp 4.*heads 3"):
        check_mesh(world=6, sp=4, packs_per_step=6, micro_batch=1, num_heads=3)
    with pytest.raises(MeshError, match=r"packs_per_step must be a multiple.*packs_per_step 6, train\.micro_batch 4"):
        check_mesh(world=2, sp=1, packs_per_step=6, micro_batch=4, num_heads=4)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3, 8])
def test_split_attention_equals_whole(world: int) -> None:
    ranks = run_ranks(world, parallel_cases.attention, HEADS)
    for case, (num_heads, num_kv_heads) in enumerate(HEADS):
        tensors, mask = parallel_cases.attention_inputs(num_heads, num_kv_heads)
        q, k, v = (tensor.clone().requires_grad_() for tensor in tensors[:3])
        out = parallel_cases.attend(q, k, v, mask)
        out.backward(tensors[3])
        for i, whole in enumerate([out.detach(), q.grad, k.grad, v.grad]):
            joined = torch.cat([rank[case][i] for rank in ranks], dim=2)
            torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_split_attention_equals_that_of_deepspeed() -> None:
    """For numbers of heads that 2 divides: DeepSpeed's layer needs a key/value head for every rank."""
    cases = [heads for heads in HEADS if not any(number % 2 for number in heads)]
    assert len(cases) > 3
    for ours, reference in run_ranks(2, parallel_cases.both_attentions, cases):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


def test_a_group_stays_on_one_machine_unless_the_recipe_allows_more() -> None:
    numbers = {"world": 8, "packs_per_step": 8, "micro_batch": 1, "num_heads": 8}
    machines = ["a"] * 4 + ["b"] * 4
    check_mesh(**numbers, sp=4, machines=machines)
    check_mesh(**numbers, sp=8, machines=["a"] * 8)
    check_mesh(**numbers, sp=8, machines=machines, sp_across_machines=True)
    with pytest.raises(MeshError, match=r"ranks 0-7 share a pack and run on a, b; .*train\.sp_across_machines"):
        check_mesh(**numbers, sp=8, machines=machines)
    with pytest.raises(MeshError, match=r"ranks 2-3 share a pack and run on a, b"):
        check_mesh(**numbers, sp=2, machines=["a"] * 3 + ["b"] * 5)


@pytest.mark.dist
def test_ranks_know_the_machine_of_every_rank() -> None:
    for machines in run_ranks(2, parallel_cases.machines):
        assert machines == ["machine 0", "machine 1"]
