"""The presets against transformers' Molmo2 on the meta device, and the model package by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import reference_config
from transformers import Molmo2ForConditionalGeneration
from transformers.models.molmo2.modeling_molmo2 import Molmo2RotaryEmbedding

from molmo2.model.decoder import rope_frequencies
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.weights.names import from_foreign

ROOT = Path(__file__).resolve().parents[3]
TOTALS = {"nano": 1_153_787_344, "4b": 4_850_869_200, "8b": 8_661_703_120, "o-7b": 7_760_786_896}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_has_the_shape_of_transformers(name: str) -> None:
    with torch.device("meta"):
        ours = Molmo2(PRESETS[name])
        reference = Molmo2ForConditionalGeneration(reference_config(PRESETS[name]))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert from_foreign(shapes, reference.state_dict()).keys() == shapes.keys()
    total = sum(parameter.numel() for parameter in ours.parameters())
    assert total == sum(parameter.numel() for parameter in reference.parameters())
    assert total == TOTALS.get(name, total)


def test_nano_is_qwen3_at_its_smallest() -> None:
    with torch.device("meta"):
        text = Molmo2(PRESETS["nano"]).text
    assert sum(p.numel() for p in text.parameters()) - text.embedding.added.numel() == 596_049_920


@pytest.mark.parametrize("name", ["4b", "o-7b"])
def test_rotary_tables_equal_transformers_in_every_layer(name: str) -> None:
    config = PRESETS[name].text
    reference = reference_config(PRESETS[name]).text_config
    tables = {scaled: Molmo2RotaryEmbedding(reference, scaled=scaled) for scaled in (False, True)}
    scaled_layers = config.rope_scaling.layers if config.rope_scaling else ()
    assert list(scaled_layers) == ([3, 7, 11, 15, 19, 23, 27, 31] if name == "o-7b" else [])
    for layer in range(config.num_layers):
        frequencies, factor = rope_frequencies(config, layer)
        table = tables[layer in scaled_layers]
        torch.testing.assert_close(frequencies, table.inv_freq, atol=0, rtol=1e-6)
        assert factor == pytest.approx(table.attention_scaling, rel=1e-12)


BLOCKED = """
import sys

class OnlyTorch:
    allowed = {allowed!r}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.allowed or name.split(".")[0] in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(name)

import torch, torch.nn.attention.flex_attention, torch.utils.checkpoint  # with whatever torch itself needs
sys.meta_path.insert(0, OnlyTorch())
for name in [n for n in sys.modules if n.split(".")[0] in {{"numpy", "pydantic", "shards", "transformers"}}]:
    del sys.modules[name]
from molmo2.model import attention, flops, generate, molmo2
from molmo2.model import presets as config
model = molmo2.Molmo2(config.PRESETS["tiny"]).init_weights(0)
ids = torch.arange(6)[None]
args = ids, ids, torch.full_like(ids, 10_000), ids > 9, torch.zeros((0, 48, 48, 3), dtype=torch.uint8)
print(tuple(model(*args, torch.zeros((0, 4), dtype=torch.int64)).shape))
"""


@pytest.mark.slow
def test_model_runs_with_torch_alone() -> None:
    code = BLOCKED.format(allowed={"torch", "molmo2"})
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(1, 6, 512)"
    refused = subprocess.run([sys.executable, "-c", code + "import pyarrow"], cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: pyarrow" in refused.stderr  # the block blocks
