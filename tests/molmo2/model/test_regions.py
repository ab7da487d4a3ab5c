"""Compiled regions: equal to the model as it is, without graph breaks, and with few graphs whatever the packs."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import engine_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from molmo2.config import RecipeError
from molmo2.model.activations import saved_bytes
from molmo2.model.lora import add_adapters
from molmo2.model.loss import BYTES_PER_LOGIT, Head, chunk_sums, rows_per_chunk
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import RopeScaling
from molmo2.model.regions import compile_regions
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import TrainingModule
from shards.stream.collate import Batch

OLMO = replace(
    engine_cases.CONFIG,
    text=replace(
        engine_cases.CONFIG.text,
        qk_norm="olmo",
        norm_after=True,
        rope_scaling=RopeScaling(factor=8.0, attention_factor=1.2, original_max_positions=64, layers=(1, 3)),
    ),
)
# Dynamo looks at the gradient of each input, and at this warning it gives up where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def module(level: str, model: Molmo2 | None = None, **train: Any) -> TrainingModule:
    recipe = engine_cases.recipe(residual_dropout=0.1, **train)
    module = TrainingModule(model or engine_cases.model(), recipe, SINGLE).train()
    module.model.set_recompute(level, None if level == "none" else 2)
    module.chunk_rows = 4
    return module


def step(module: TrainingModule, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    module.zero_grad()
    loss, _ = module(module.place(batch), 3)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_equal_steps(plain: TrainingModule, compiled: TrainingModule, batch: Batch) -> None:
    (loss, wanted), (compiled_loss, gradients) = step(plain, batch), step(compiled, batch)
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max().item() <= 1e-5 * max(largest, 1e-9), name


# Each pack, and the number of graphs after it. The first needs all five regions. A size of one has a graph of its own:
# of a chunk of crops, of the connector where a pack has no visual, of a chunk of the loss. Another width of pooling
# makes the connector anew, for any width; another length both halves of a layer, for any length.
PACKS = [
    (engine_cases.batch(1, 2), 5),  # 4 crops, in two chunks of 2
    (engine_cases.batch(3, 3), 6),  # 5 crops, the last alone
    (engine_cases.batch(5, 3), 6),
    (engine_cases.batch(2, 0), 7),
    (engine_cases.batch(4, 1, weightless=True), 8),
    (replace(engine_cases.batch(1, 2), pooling=engine_cases.batch(1, 2).pooling.repeat(1, 3)[:, :9]), 9),
    (engine_cases.batch(3, 3), 9),
    (engine_cases.batch(6, 2, 64), 11),
    (engine_cases.batch(7, 1, 96), 11),
    (engine_cases.batch(8, 3, 80), 11),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "level"), [("eager", "none"), ("eager", "light"), ("eager", "full"), ("aot_eager", "light")]
)
def test_values_gradients_and_numbers_of_graphs(backend: str, level: str) -> None:
    graphs = CompileCounterWithBackend(backend)
    plain, compiled = module(level), module(level)
    compile_regions(compiled.model, graphs)
    counts = []
    for batch, _ in PACKS:
        assert_equal_steps(plain, compiled, batch)
        counts.append(graphs.frame_count)
    expected = [count for _, count in PACKS]
    if level == "none":  # crops are not computed in chunks, so that a single one comes with the fourth pack only
        expected[1:3] = [5, 5]
    assert counts == expected
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_deep_model_has_the_graphs_of_a_shallow_one() -> None:
    """Of both kinds: Olmo-3's norms are elsewhere, and some of its layers have another rotary embedding."""
    for preset in (engine_cases.CONFIG, OLMO):
        torch._dynamo.reset()
        config = replace(preset, text=replace(preset.text, num_layers=12), vit=replace(preset.vit, num_layers=12))
        plain, compiled = (module("light", Molmo2(config).init_weights(7)) for _ in range(2))
        graphs = CompileCounterWithBackend("eager")
        compile_regions(compiled.model, graphs)
        assert_equal_steps(plain, compiled, PACKS[0][0])
        assert graphs.frame_count == 5


@pytest.mark.slow
def test_evaluation_makes_no_graph_and_adapters_are_compiled() -> None:
    plain, compiled = (module("full") for _ in range(2))
    for one in (plain, compiled):
        add_adapters(one.model, 2, 4.0, seed=1)
    graphs = CompileCounterWithBackend("eager")
    compile_regions(compiled.model, graphs)
    with torch.no_grad():
        losses = [one.eval()(one.place(PACKS[0][0]), 3)[0].item() for one in (plain, compiled)]
    assert losses[0] == losses[1] and graphs.frame_count == 0
    assert_equal_steps(plain.train(), compiled.train(), PACKS[0][0])
    assert graphs.frame_count == 5


@pytest.mark.slow
@pytest.mark.parametrize("level", ["light", "full"])
def test_compiled_halves_keep_what_the_others_keep(level: str) -> None:
    """Beside them autograd keeps a few tensors of the parts that are not compiled, or not recomputed."""
    batch = engine_cases.batch(1, 2, 96)
    sizes = []
    for compile_them in (False, True):
        one = module(level)
        if compile_them:
            compile_regions(one.model, "aot_eager")
        placed = one.place(batch)
        sizes.append(saved_bytes(one, lambda one=one, placed=placed: one(placed, 3)[0]))
    assert sizes[1] <= sizes[0]


@pytest.mark.slow
def test_a_budget_bounds_what_graphs_keep_and_changes_no_result() -> None:
    """From what they keep of themselves down to what "light" keeps, with the partitioner that training uses."""
    text = replace(engine_cases.CONFIG.text, hidden_size=128, intermediate_size=384, num_layers=2)
    config = replace(engine_cases.CONFIG, text=text)
    plain, batch = module("none", Molmo2(config).init_weights(7)), engine_cases.batch(1, 2, 192)

    def kept(level: str, budget: float) -> int:
        torch._dynamo.reset()
        one = module(level, Molmo2(config).init_weights(7))
        graphs = CompileCounterWithBackend("aot_eager_decomp_partition")
        compile_regions(one.model, graphs, budget)
        placed = one.place(batch)
        size = saved_bytes(one, lambda: one(placed, 3)[0])
        assert_equal_steps(plain, one, batch)
        assert not counters["graph_break"]
        return size

    light = kept("light", 1.0)
    sizes = [kept("none", budget) for budget in (0.01, 0.5, 1.0)]
    torch._functorch.config.activation_memory_budget = 1.0
    assert sizes == sorted(set(sizes)) and sizes[0] < 1.1 * light < sizes[-1] / 2
    assert sizes[1] < 1.1 * (light + 0.5 * (sizes[-1] - light))  # the estimate: a straight line


@pytest.mark.slow
def test_a_compiled_chunk_of_the_loss_keeps_the_bytes_that_are_counted() -> None:
    """Buffers of rows x vocabulary in the code that is generated for a chunk and its backward."""
    vocabulary, rows = 5000, 96
    head = Head(64, vocabulary, bias=False).to(torch.bfloat16)
    chunk = torch.compile(lambda *values: chunk_sums(*values, head, 1e-4), fullgraph=True)

    def run() -> None:
        hidden = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True)
        chunk(hidden, torch.zeros(rows, dtype=torch.int64), torch.ones(rows))[0].sum().backward()

    _, codes = run_and_get_code(run)
    buffer = rf"empty_strided_cpu\(\({rows}, {vocabulary}\), \({vocabulary}, 1\), torch.(\w+)\)"
    found = re.findall(buffer, "".join(codes))
    assert sum({"bfloat16": 2, "float32": 4}[name] for name in found) == BYTES_PER_LOGIT[True]
    assert 2000 < rows_per_chunk(151936, compiled=True) < 4000


def test_a_recipe_decides_and_zero_3_is_refused() -> None:
    assert engine_cases.recipe().train.compile is None
    assert engine_cases.recipe(compile=True, zero_stage=2).train.compile
    with pytest.raises(RecipeError, match="compile: ZeRO-3 gathers parameters inside layers; use zero_stage 2"):
        engine_cases.recipe(compile=True, zero_stage=3)


# ZeRO stage, ranks that share a pack, the recipe's `compile`, and the backend
CASES: list[tuple[int, int, bool | None, str]] = [
    (0, 1, True, "eager"),
    (1, 2, True, "eager"),
    (2, 1, True, "eager"),
    (2, 2, True, "aot_eager"),
    (2, 2, None, "eager"),
    (3, 2, None, "eager"),
]


@pytest.mark.dist
def test_compiled_gradients_of_the_engine_equal_one_process() -> None:
    plain = TrainingModule(engine_cases.model(), engine_cases.recipe(), SINGLE).train()
    for case in engine_cases.BATCHES:
        plain(plain.place(engine_cases.make(case)))[0].backward()
    wanted = {name: parameter.grad for name, parameter in plain.model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for rank in run_ranks(2, engine_cases.compiled_gradients, CASES):
        for case, (gradients, graphs, breaks) in zip(CASES, rank, strict=True):
            assert (graphs > 0) == (case[2] is True) and not breaks, case
            for name, gradient in wanted.items():
                assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, (case, name)
