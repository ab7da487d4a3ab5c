"""On a real GPU: attention, compiled regions, recomputation, dropout and the whole step equal those of a CPU."""

import engine_cases
import pytest
import torch
from torch import Tensor

from molmo2.model.attention import dense_attention, tiled_attention
from molmo2.model.dropout import Dropout, seed_words
from molmo2.model.flex import flex
from molmo2.model.fp8 import use_fp8
from molmo2.model.mask import MEMBER, TRUNK, AttentionMask
from molmo2.model.regions import compile_regions
from molmo2.model.visual_order import visual_first_order
from molmo2.parallel.mesh import SINGLE
from molmo2.training.engine import PAD_CROPS, TrainingModule

DEVICE = "cuda"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU here: the same equalities hold on a CPU in the other files"
    ),
    pytest.mark.filterwarnings("ignore"),  # of compilers and drivers
]


def row(length: int, ordered: bool = False) -> AttentionMask:
    """Half a video with two branches, half texts of 300 tokens; `ordered`: visual tokens first."""
    segments, visual = torch.empty(1, length, dtype=torch.int32), torch.zeros(1, length, dtype=torch.bool)
    half, quarter = length // 2, length // 8
    segments[:, :half] = TRUNK
    segments[:, half - 2 * quarter : half] = torch.arange(2 * quarter) // quarter + 1
    visual[:, : half - 2 * quarter] = torch.arange(half - 2 * quarter) % 88 >= 6
    segments[:, half:] = (1 + torch.arange(length - half) // 300) * MEMBER + TRUNK
    if ordered:
        order = visual_first_order(segments, visual)
        moved = segments.gather(1, order), visual.gather(1, order), order.int()
        return AttentionMask(*(vector.to(DEVICE) for vector in moved))
    return AttentionMask(segments.to(DEVICE), visual.to(DEVICE))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("backend", [flex, tiled_attention, dense_attention])
def test_backends_equal_float32_of_the_whole_mask(backend, ordered: bool) -> None:
    """Forward and backward, in bfloat16, at 32 heads on 8 of 128 channels; FlexAttention for several lengths."""
    for length in (1_100, 2_048, 3_333):
        generator = torch.Generator().manual_seed(length)
        shapes = [(1, heads, length, 128) for heads in (32, 8, 8, 32)]
        q, k, v, gradient = (torch.randn(shape, generator=generator).to(DEVICE).bfloat16() for shape in shapes)

        mask = row(length, ordered)

        def results(attend, dtype: torch.dtype, tensors=(q, k, v), gradient=gradient, mask=mask):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
            out = attend(*leaves, mask)
            return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

        exact = results(dense_attention, torch.float32)
        for value, wanted in zip(results(backend, torch.bfloat16), exact, strict=True):
            assert (value.float() - wanted).norm() < 2e-2 * wanted.norm(), length


def test_dropout_is_that_of_a_cpu() -> None:
    x, rates, seeds = torch.ones(2, 333, 64), torch.full((2, 333), 0.3), seed_words([(7, 3, 1), (7, 3, 2)])
    here, there = (
        dropout(x.to(device), dropout.keys(4)[3]).cpu()
        for device in ("cpu", DEVICE)
        for dropout in [Dropout(rates=rates.to(device), seeds=seeds.to(device), start=70_000)]
    )
    assert torch.equal(here, there)


def steps(device: str, level: str, compiled: bool) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients, on the CPU, of packs with different numbers of crops and rows with loss."""
    recipe = engine_cases.recipe(residual_dropout=0.1)
    module = TrainingModule(engine_cases.model().to(device), recipe, SINGLE).train()
    module.model.set_recompute(level, None if level == "none" else 2)
    module.model.vit.pad_crops = PAD_CROPS
    if compiled:
        torch._dynamo.reset()
        compile_regions(module.model)
    results = []
    for case in engine_cases.BATCHES:
        module.zero_grad()
        loss, _ = module(module.place(engine_cases.make(case), device), 3)
        loss.backward()
        results.append((loss.item(), {name: p.grad.cpu() for name, p in module.named_parameters()}))
    return results


def test_8_bit_layers_are_near_those_of_16_bits() -> None:
    """On the GPU's own products; the emulation on a CPU is held in test_fp8.py."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no 8-bit products with a scale for each row")
    module = TrainingModule(engine_cases.model().to(DEVICE, torch.bfloat16), engine_cases.recipe(), SINGLE).train()
    placed = module.place(engine_cases.make(engine_cases.BATCHES[0]), DEVICE)
    wanted = module(placed, 3)[0].item()
    use_fp8(module.model, torch.device(DEVICE))
    loss, _ = module(placed, 3)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("level", ["none", "light", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_equals_that_of_a_cpu(compiled: bool, level: str) -> None:
    """In float32."""
    on_cpu, on_gpu = steps("cpu", "none", False), steps(DEVICE, level, compiled)
    for (loss, wanted), (found, gradients) in zip(on_cpu, on_gpu, strict=True):
        assert found == pytest.approx(loss, rel=1e-4)
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert (gradients[name] - gradient).abs().max().item() <= 1e-3 * max(largest, 1e-9), name
