"""Ranks that share packs decide alike about a damaged sample, whichever of them met it."""

import shutil
from pathlib import Path

import numpy as np
import peers_cases
import pytest
import torch
import toy_run
from ranks import run_ranks


@pytest.mark.dist
def test_a_sample_that_one_rank_finds_damaged_is_masked_on_both(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    toy_run.write_recipe(tmp_path / "r.yaml", "r")
    rows = np.load(tmp_path / "1/shards/sft/toy/000000.idx.npy")
    tar = tmp_path / "1/shards/sft/toy/000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(rows["offset"][14]) + 700] ^= 1  # of rank 1's copy alone; the first step reads it
    tar.write_bytes(data)
    first, second = run_ranks(2, peers_cases.read_step, str(tmp_path))
    assert not any(pack["read"] for pack in first)
    assert any(pack["read"] for pack in second)
    for one, other in zip(first, second, strict=True):
        assert one["masked"] == other["masked"] == other["read"]
        for name, tensor in one["tensors"].items():
            assert torch.equal(tensor, other["tensors"][name]), name
        assert one["pixels"] + other["pixels"] == int(one["tensors"]["visual_crops"].sum())
    assert any(pack["tensors"]["loss_weights"].any() for pack in first)  # what is whole still counts
