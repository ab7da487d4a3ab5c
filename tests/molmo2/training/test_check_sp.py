"""The check before training passes when all is well, and refuses when something on the way is broken."""

import check_sp_cases
import engine_cases
import pytest
from ranks import run_ranks

from molmo2.parallel.mesh import SINGLE
from molmo2.training.check_sp import check_sequence_parallel


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_agree_pass(world: int) -> None:
    for found in run_ranks(world, check_sp_cases.check):
        assert set(found) == {"loss", "vit", "connector", "llm"}
        assert max(found.values()) < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("fault", ["heads", "vision gradient", "one rank's loss"])
def test_a_fault_is_refused_on_every_rank(fault: str) -> None:
    for error in run_ranks(2, check_sp_cases.check, fault):
        assert isinstance(error, str)
        assert "a small pack differs with train.sp 2" in error


def test_without_shared_packs_there_is_nothing_to_check() -> None:
    assert check_sequence_parallel(engine_cases.model(), engine_cases.recipe(), SINGLE) == {}
