"""The model's benchmark at its smallest size: it runs, checks the losses and ends with its JSON line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from molmo2.model.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("bench_model", ROOT / "benchmarks/bench_model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_model", module)
    spec.loader.exec_module(module)
    return module


def test_last_line_is_the_bars(bench, monkeypatch, capsys) -> None:
    monkeypatch.setitem(bench.SIZES, "tiny", bench.Case(PRESETS["tiny"], 160, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--sizes", "tiny", "--rounds", "1"])
    bench.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "model"
    assert result["bars"].keys() == {"cpu_ratio_eager_tiny", "cpu_ratio_sdpa_tiny"}
    for figure in result["bars"].values():
        assert figure["value"] > 0 and figure["bar"] == 1 and figure["ok"] == (figure["value"] <= 1)


def test_different_losses_are_refused(bench) -> None:
    case = bench.Case(PRESETS["tiny"], 160, 4)
    model = bench.make_ours(case.config, torch.device("cpu"), torch.float32)
    steps = {}
    for name, seed in (("ours", 0), ("other", 1)):
        batch = bench.make_batch(case, torch.device("cpu"))
        batch = dataclasses.replace(batch, labels=torch.where(batch.labels >= 0, batch.labels + seed, -100) % 512)
        steps[name] = (model, lambda batch=batch: bench.our_loss(model, batch))
    with pytest.raises(SystemExit, match="losses differ"):
        bench.rounds_of(steps, 1)


@pytest.mark.parametrize(("tokens", "crops"), [(160, 4), (2048, 0), (4096, 16)])
def test_rows_have_the_size_asked_for(bench, tokens, crops) -> None:
    case = bench.Case(PRESETS["tiny"], tokens, crops)
    batch = bench.make_batch(case, torch.device("cpu"))
    lengths = {getattr(batch, name).shape for name in ("input_ids", "position_ids", "segment_ids", "labels")}
    assert lengths == {(1, tokens)} and len(batch.pixels) == crops
    assert int((batch.input_ids == case.config.image_patch_id).sum()) == len(batch.pooling) == 4 * crops
    assert not (batch.is_visual & (batch.labels != bench.IGNORED)).any()


def test_which_frames_fit(bench) -> None:
    fitting = {(t, c) for t in bench.LENGTHS for c in bench.CROPS if bench.fits(PRESETS["nano"], t, c)}
    assert fitting == {(4096, 0), (16384, 0), (16384, 128), (36864, 0), (36864, 128), (36864, 384)}
