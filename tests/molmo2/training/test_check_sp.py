"""The check before training passes when all is well, and refuses when something on the way is broken."""

import check_sp_cases
import engine_cases
import pytest
import torch
from ranks import run_ranks

from molmo2.model.attention import SHORT
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import SINGLE
from molmo2.training.check_sp import check_length, check_pack, check_sequence_parallel


@pytest.mark.dist
def test_ranks_that_agree_pass_and_a_fault_is_refused_on_every_rank() -> None:
    names = {"loss", *(name for name, _ in engine_cases.model().named_parameters())}
    sound, faults = zip(*run_ranks(2, check_sp_cases.check), strict=True)
    for found in sound:
        for name, differences in found.items():
            assert set(differences) == names
            exact = name != "bf16"
            assert differences["loss"] < (1e-6 if exact else 5e-3)
            assert max(differences.values()) < (1e-4 if exact else 5e-2)
    for errors in faults:
        assert all(error and "tokens in" in error and "differs with train.sp 2" in error for error in errors.values())
        assert "values: text.layers.0.down_proj.weight 0.01; set" in str(errors["gradient of one matrix"])


@pytest.mark.dist
def test_two_groups_that_agree_pass() -> None:
    for found in run_ranks(4, check_sp_cases.sound, ["fp32"]):
        assert max(found["fp32"].values()) < 1e-4


def test_without_shared_packs_there_is_nothing_to_check() -> None:
    cpu = torch.device("cpu")
    assert check_sequence_parallel(engine_cases.model(), engine_cases.recipe(), SINGLE, cpu) == {}


@pytest.mark.parametrize(
    ("sequence_length", "sp", "length"),
    [(36_864, 8, 9216), (36_864, 2, 9216), (49_152, 8, 12_288), (16_384, 2, 8192), (8192, 4, 8192), (4608, 3, 4608)],
)
def test_the_pack_takes_the_backend_of_the_run(sequence_length: int, sp: int, length: int) -> None:
    assert check_length(sequence_length, sp) == length
    assert length % sp == 0
    assert (length > SHORT) == (sequence_length > SHORT)


def test_the_pack_has_what_packs_of_a_long_run_have() -> None:
    pack = check_pack(PRESETS["4b"], 9216, 384)
    assert pack.input_ids.shape == (1, 9216)
    assert 0.45 < float(pack.is_visual.float().mean()) < 0.5
    assert int((pack.input_ids == PRESETS["4b"].image_patch_id).sum()) == len(pack.pooling)
    assert len(pack.pixels) == int(pack.visual_crops.sum()) > 32  # several chunks of the vision transformer
    assert sorted(set(pack.visual_crops.tolist())) == [1, 3]
    assert not pack.loss_weights[pack.is_visual].any()
    assert int((pack.loss_weights[0] > 0).nonzero()[0]) > 4000
