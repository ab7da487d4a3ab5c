"""Ranks that share packs decide alike about a damaged sample, whichever of them met it, and train on equal packs."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import engine_cases
import numpy as np
import peers_cases
import pytest
import torch
import toy_run
from ranks import run_ranks

from molmo2.config import load_recipe
from molmo2.training.run import OWN_FIELDS, field_digests
from shards.stream.collate import Batch
from shards.stream.plan import Cursor, open_plan


@pytest.mark.dist
def test_a_sample_that_one_rank_finds_damaged_is_masked_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_run.build_toy(tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path / "0"))
    recipe = load_recipe(toy_run.write_recipe(tmp_path / "r.yaml", "r"))
    plan = open_plan(recipe.roots, recipe.data.drawn_mixture, recipe.plan_settings)
    row = next(draw.row for pack in plan.step(Cursor()).packs for draw in pack.draws if draw.shard == 0)
    rows = np.load(tmp_path / "1/shards/sft/toy/000000.idx.npy")
    tar = tmp_path / "1/shards/sft/toy/000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(rows["offset"][row]) + 700] ^= 1  # of rank 1's copy alone
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


@pytest.mark.dist
def test_the_same_values_in_another_order_end_the_run_on_both(tmp_path: Path) -> None:
    toy_run.build_toy(tmp_path / "0")
    (tmp_path / "1").symlink_to(tmp_path / "0")
    toy_run.write_recipe(tmp_path / "r.yaml", "r")
    for rank, error in enumerate(run_ranks(2, peers_cases.read_reordered, str(tmp_path))):
        assert error is not None
        assert error.startswith(f"step 1: rank {rank} and its sp peers read different packs")
        assert "fields labels);" in error and "verify_shards.py" in error


@pytest.mark.parametrize("name", [field.name for field in fields(Batch) if field.name not in OWN_FIELDS])
def test_the_order_of_every_shared_field_is_in_its_digest(name: str) -> None:
    batch = engine_cases.batch(seed=1, visuals=3)
    value = getattr(batch, name)
    if isinstance(value, torch.Tensor):
        value = torch.arange(value.numel()).reshape(value.shape).to(value.dtype)
        batch, other = replace(batch, **{name: value}), value.flatten().flip(0).view(value.shape)
    else:
        changes = {"step": 1, "slots": (1,), "divisor": 11.0}
        changes |= {"cursor": batch.cursor._replace(offset=1), "work": batch.work._replace(crops=1)}
        other = changes[name]
    digests, changed = field_digests(batch), field_digests(replace(batch, **{name: other}))
    assert [field for field in digests if digests[field] != changed[field]] == [name]
    assert digests == field_digests(replace(batch, **{name: value.clone() if torch.is_tensor(value) else value}))
