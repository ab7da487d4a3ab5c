"""8-bit layers: which they are, how far they round, one graph, and the recipes that may ask for them."""

from typing import Any

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from molmo2.config import RecipeError
from molmo2.model.fp8 import use_fp8
from molmo2.model.molmo2 import Molmo2
from molmo2.model.regions import compile_regions
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import TrainingModule

CPU = torch.device("cpu")
CHOSEN = {"attention.q_proj", "attention.o_proj", "gate_proj", "up_proj", "down_proj"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.slow,
]


def eight_bit() -> Molmo2:
    model = engine_cases.model().to(torch.bfloat16)
    use_fp8(model, CPU)
    return model


def loss(model: Molmo2) -> torch.Tensor:
    module = TrainingModule(model, engine_cases.recipe(), SINGLE).train()
    return module(module.place(engine_cases.batch(1, 2)), 3)[0]


def test_the_large_layers_of_the_language_model_are_chosen_and_no_name_changes() -> None:
    plain, model = engine_cases.model(), eight_bit()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    layers = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert layers == {f"text.layers.{number}.{name}" for number in range(2) for name in CHOSEN}


def test_a_product_is_rounded_to_8_bits_and_no_further() -> None:
    """Three bits of mantissa: a rounded value is off by at most 1/16, and by about 1/38 in the mean square."""
    model = Molmo2(engine_cases.CONFIG).init_weights(1).to(torch.bfloat16)
    layer = torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    model.text.layers[0].up_proj = layer
    x = torch.randn(64, 512, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    exact = layer(x).float()
    use_fp8(model, CPU)
    rounded = model.text.layers[0].up_proj(x).float()
    assert 0.005 < (rounded - exact).norm() / exact.norm() < 0.06


def test_the_loss_is_near_and_compiled_it_is_five_graphs() -> None:
    plain = loss(engine_cases.model().to(torch.bfloat16)).item()
    model = eight_bit()
    first = loss(model)
    assert first.item() == pytest.approx(plain, rel=0.01) and first.item() != plain
    torch._dynamo.reset()
    counters.clear()
    graphs = CompileCounterWithBackend("aot_eager")
    compile_regions(model, graphs)
    compiled = loss(model)
    compiled.backward()
    assert compiled.item() == pytest.approx(first.item(), rel=1e-3)
    assert graphs.frame_count == 5 and not counters["graph_break"]
    assert all(parameter.grad is not None for parameter in model.text.layers.parameters())
    torch._dynamo.reset()


@pytest.mark.dist
def test_engines_train_them_alike_however_a_pack_is_shared() -> None:
    one, two = run_ranks(2, engine_cases.losses_in_8_bits, [(2, 1), (2, 2), (3, 2)])
    assert one == two
    alone, shared, partitioned = one
    assert all(last < first for first, last in one)  # it learns
    assert shared == pytest.approx(alone, rel=0.02) and partitioned == pytest.approx(shared, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": True, "precision": "fp32"}, "fp8 needs precision: bf16"),
        ({"activation_budget": 0.5}, "activation_budget below 1 needs compile: true and recompute: none"),
        (
            {"activation_budget": 0.5, "compile": True, "recompute": "light"},
            "activation_budget below 1 needs compile: true and recompute: none",
        ),
    ],
)
def test_settings_that_do_nothing_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        engine_cases.recipe(**settings)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    with pytest.raises(ValueError, match=r"train\.fp8 needs an H100 or a newer GPU, not NVIDIA A100-SXM4-40GB"):
        use_fp8(engine_cases.model(), torch.device("cuda"))
