"""A training step on a device that is not there, with torch's fake tensors: shapes, dtypes and a device, no values.

"cuda" has the model's own choices for a GPU, but torch's backward asks the driver for it, so that only the forward pass
can run without one. A backend that is registered from Python has a backward, and changes the process that registers it.
With it torch 2.14 aborts in the backward of a checkpoint, so that nothing is recomputed there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import engine_cases
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask

from molmo2.model import attention, flex
from molmo2.model import loss as loss_file
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS, ModelConfig
from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.places import PlacedBatch, place_batch
from molmo2.training.check_sp import check_pack
from molmo2.training.engine import PAD_CROPS, TrainingModule
from shards.stream.collate import Batch

DEVICE = "unreal"


def _fused(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, enable_gqa: bool, kernel_options: dict[str, Any]
) -> Tensor:
    """In place of FlexAttention, whose kernels are compiled for a real device: a result of the same shape."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    assert block_mask.kv_num_blocks.device == q.device and enable_gqa == (group > 1)
    return (q * k.mean(2, keepdim=True)).sigmoid() * v


@contextmanager
def gpu_attention() -> Iterator[None]:
    """The backends that a GPU takes, on any device."""
    choose = attention.choose_attention
    with (
        mock.patch.object(flex, "_compiled_flex", lambda tuned: _fused),
        mock.patch.object(flex, "kernel_options", lambda device: {}),
        mock.patch.object(flex, "has_triton", lambda: True),
        mock.patch.object(attention, "choose_attention", lambda device, length: choose(torch.device("cuda"), length)),
    ):
        yield


def run(preset: ModelConfig, batch: Batch, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and loss of a batch, on `DEVICE` backward too; the devices and dtypes of what came of it."""
    placed = place_batch(batch, SINGLE, preset.patches_per_crop)
    with ExitStack() as stack, FakeTensorMode() as fake, gpu_attention():
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                module = TrainingModule(Molmo2(preset), engine_cases.recipe(residual_dropout=0.1), SINGLE).train()
        finally:
            torch.set_default_dtype(torch.float32)

        def faked(value: Any) -> Any:
            return fake.from_tensor(value).to(device) if isinstance(value, Tensor) else value

        module.model.vit.pad_crops = PAD_CROPS
        parts = [part._make(map(faked, part)) for part in (placed.visual, placed.loss)]
        module.model.set_recompute(
            "full" if device == "cuda" else "none", chunk_crops=2 if preset is engine_cases.CONFIG else 192
        )
        if device == DEVICE:
            stack.enter_context(mock.patch.object(loss_file, "checkpoint", lambda f, *a, **options: f(*a)))
        loss, sums = module(PlacedBatch(placed.batch._map_tensors(faked), *parts, faked(placed.seeds)), 3)
        if device == DEVICE:
            loss.backward()
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    return {
        "devices": {value.device.type for value in (loss, *sums)},
        "dtypes": {value.dtype for value in (loss, *sums)},
        "gradients": {p.grad.dtype for p in module.parameters() if p.grad is not None},
        "missing": missing,
    }


def tiny(device: str, number: int) -> dict[str, Any]:
    """A batch of `engine_cases`, in float32."""
    return run(engine_cases.CONFIG, engine_cases.make(engine_cases.BATCHES[number]), device, torch.float32)


def released(device: str, length: int) -> dict[str, Any]:
    """A pack of a video of up to 384 frames for the 4b model, in bfloat16."""
    return run(PRESETS["4b"], check_pack(PRESETS["4b"], length, 384), device, torch.bfloat16)


def with_backward(lengths: list[int]) -> list[dict[str, Any]]:
    """All of them with backward; to be run in a process of its own."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    small = [tiny(DEVICE, number) for number in range(len(engine_cases.BATCHES))]
    return small + [released(DEVICE, length) for length in lengths]
