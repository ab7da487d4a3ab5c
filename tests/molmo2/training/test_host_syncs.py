"""A step never waits for the device: no value is read on the host, and no shape depends on data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import engine_cases
import fake_device_cases
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from molmo2.model.attention import dense_attention
from molmo2.parallel.mesh import SINGLE
from molmo2.training import engine
from molmo2.training.engine import TrainingModule

READS = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")


@contextmanager
def no_reads() -> Iterator[None]:
    """Reading a tensor's value on the host, or its non-zero places, is an error."""

    def refused(name: str) -> Callable[..., Any]:
        def read(*arguments: Any, **options: Any) -> Any:
            raise AssertionError(f"Tensor.{name}: the host would wait for the device")

        return read

    getitem = Tensor.__getitem__

    def checked(tensor: Tensor, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts):
            raise AssertionError("a boolean index: the host would wait for the device")
        return getitem(tensor, index)

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, refused(name))
        for name in ("nonzero", "where", "masked_select"):
            function = getattr(torch, name)
            alone = name == "where"  # with one argument it is nonzero
            patch.setattr(
                torch, name, lambda *a, f=function, n=name, ok=alone: f(*a) if ok and len(a) > 1 else refused(n)()
            )
        patch.setattr(Tensor, "__getitem__", checked)
        yield


def training_module(**train: Any) -> TrainingModule:
    module = TrainingModule(engine_cases.model(), engine_cases.recipe(**train), SINGLE).train()
    module.model.set_recompute("full", chunk_crops=2)
    module.chunk_rows = 4
    return module


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: bool(x),
        lambda x: int(x),
        lambda x: x[x > 0],
    ],
)
def test_a_read_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with no_reads(), pytest.raises(AssertionError, match="the host would wait"):
        read(torch.ones(1))


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("case", engine_cases.BATCHES)
def test_no_value_is_read_in_forward_loss_and_backward(case: tuple[int, int, bool], zero_stage: int) -> None:
    module = training_module(zero_stage=zero_stage, residual_dropout=0.1)
    module.attend = dense_attention  # tiles are for CPUs: their bounds are read once
    placed = module.place(engine_cases.make(case))
    with no_reads():
        module(placed, 3)[0].backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def check(results: dict[str, Any], device: str) -> None:
    """All results are on the device; the sums are float32."""
    assert results["devices"] == {device}
    assert results["dtypes"] == {torch.float32}


@pytest.mark.parametrize("number", range(len(engine_cases.BATCHES)))
def test_forward_and_loss_on_a_gpu_mix_no_devices_and_take_no_shape_from_data(number: int) -> None:
    check(fake_device_cases.tiny("cuda", number), "cuda")


def test_a_tensor_that_stayed_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    width = engine_cases.CONFIG.text.hidden_size
    monkeypatch.setattr(engine, "take_loss_rows", lambda hidden, rows, mesh: torch.zeros(len(rows.labels), width))
    with pytest.raises(RuntimeError, match="devices"):
        fake_device_cases.tiny("cuda", 0)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 36_864])
def test_forward_and_loss_of_the_4b_model_run_on_a_fake_gpu(length: int) -> None:
    check(fake_device_cases.released("cuda", length), "cuda")


@pytest.mark.dist
def test_backward_too_runs_on_a_fake_device() -> None:
    [results] = run_ranks(1, fake_device_cases.with_backward, [1024, 36_864])
    assert len(results) == len(engine_cases.BATCHES) + 2
    for number, result in enumerate(results):
        check(result, fake_device_cases.DEVICE)
        assert result["missing"] == []
        assert result["gradients"] == {torch.float32 if number < len(engine_cases.BATCHES) else torch.bfloat16}
