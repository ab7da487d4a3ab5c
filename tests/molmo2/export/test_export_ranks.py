"""Export from DeepSpeed's own files: any ZeRO stage, any number of ranks, the weights that were trained."""

import json
from pathlib import Path

import engine_cases
import export_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from toy_run import make_tokenizer

from molmo2.checkpoint.files import WEIGHTS
from molmo2.checkpoint.lookup import load_weights, open_checkpoint
from molmo2.export.card import about_checkpoint
from molmo2.export.model import export_model
from molmo2.weights.names import from_foreign, open_tensors


def exported(name: str, root: Path) -> dict[str, Tensor]:
    """The tensors of an export, by our names, read back from its files."""
    checkpoint = open_checkpoint(name)
    assert not (checkpoint.path / WEIGHTS).exists()  # consolidated from DeepSpeed's files
    config, weights, _ = load_weights(checkpoint.path)
    out = root / "exports" / name
    differences = export_model(config, weights, root / "tokenizer", out, about_checkpoint(checkpoint))
    assert max(differences.values()) < 1e-4
    assert json.loads((out / "export.json").read_text())["origin"]["run"] == name
    shapes = {key: tensor.shape for key, tensor in engine_cases.model().state_dict().items()}
    return {name: read() for name, read in from_foreign(shapes, open_tensors(out)).items()}


@pytest.mark.dist
def test_any_zero_stage_and_world_size_exports_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLMO2_DATA", str(tmp_path))
    make_tokenizer(tmp_path / "tokenizer")
    start = engine_cases.model().state_dict()
    first: dict[str, dict[str, Tensor]] = {}
    for world in export_cases.SETTINGS:
        for name, live in run_ranks(world, export_cases.save_in_mid_run, str(tmp_path))[0].items():
            got = exported(name, tmp_path)
            assert got.keys() == live.keys()
            assert all(tensor.dtype == torch.float32 for tensor in got.values())
            # Exactly the weights of the running engine; under bf16 the masters that those are rounded from.
            assert all(torch.equal(got[key].to(tensor.dtype), tensor) for key, tensor in live.items()), name
            assert any(not torch.equal(got[key], start[key]) for key in got)
            precision = name.split("-")[0]
            for key, tensor in first.setdefault(precision, got).items():
                torch.testing.assert_close(got[key], tensor, rtol=0, atol=2e-5 if precision == "fp32" else 0.03)
    assert len(list((tmp_path / "exports").iterdir())) == sum(map(len, export_cases.SETTINGS.values()))
