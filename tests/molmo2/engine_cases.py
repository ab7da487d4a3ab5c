"""A small model, random packed batches, and what the ranks of test_engine do with them."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from molmo2.checkpoint.files import save
from molmo2.config import Recipe, parse_recipe
from molmo2.model.molmo2 import Molmo2
from molmo2.model.presets import PRESETS
from molmo2.parallel.mesh import SINGLE, make_mesh
from molmo2.training import engine as engine_file
from molmo2.training.engine import TrainingModule, start_engine
from molmo2.training.optim import set_learning_rates
from shards.stream.collate import PAD_SEGMENT, Batch, own_crops
from shards.stream.plan import Cursor

TINY = PRESETS["tiny"]
CONFIG = replace(
    TINY,
    text=replace(
        TINY.text, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8
    ),
    vit=replace(TINY.vit, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, feature_layers=(1, 0)),
    connector=replace(TINY.connector, hidden_size=16, num_heads=2, intermediate_size=24),
)
TOKENS = 7  # pooled tokens of every visual of these batches


def recipe(run: str = "run", frozen: bool = False, **train: Any) -> Recipe:
    """A recipe whose clips bind, so that a wrong scale of the gradient shows."""
    group = {"lr": 1e-2, "warmup_steps": 2, "clip": 0.05}
    settings = {"steps": 6, "packs_per_step": 4, "precision": "fp32", "zero_stage": 0, **train}
    values = {
        "name": run,
        "stage": "sft",
        "model": "tiny",
        "data": {"roots": ["shards/sft"], "mixture": MIXTURE, "sequence_length": 48, "max_crops": 8},
        "train": settings,
        "optim": {"vit": group, "connector": {**group, "lr": 2e-2}, "llm": group, "freeze_base_embedding": frozen},
    }
    return parse_recipe(values, "test")


MIXTURE: dict[str, Any] = {"groups": {"all": {"rate": 1, "datasets": {"toy": None}}}}


def model(heads: tuple[int, int] = (6, 3)) -> Molmo2:
    """The small model, with so many heads for queries and for keys."""
    text = replace(CONFIG.text, num_heads=heads[0], num_kv_heads=heads[1])
    return Molmo2(replace(CONFIG, text=text)).init_weights(7)


def batch(seed: int, visuals: int, length: int = 48, divisor: float = 10.0, weightless: bool = False) -> Batch:
    """One row: `visuals` images in a trunk, two branches, then a text-only member, then padding."""
    generator = torch.Generator().manual_seed(seed)
    patch = CONFIG.image_patch_id
    trunk = [1] + [CONFIG.text.vocab_size, *[patch] * TOKENS, CONFIG.text.vocab_size + 1] * visuals
    free = length - len(trunk)
    sizes = [free // 4, free // 4, free // 4]
    text = torch.randint(2, 500, (length,), generator=generator).tolist()
    ids, segments, positions = list(trunk), [10_000] * len(trunk), list(range(len(trunk)))
    for branch, size in enumerate(sizes):
        ids += text[:size]
        segments += [branch + 1 if branch < 2 else 110_000] * size
        first = len(trunk) if branch < 2 else 0
        positions += range(first, first + size)
    padding = length - len(ids)
    input_ids = torch.tensor([ids + [0] * padding])
    segment_ids = torch.tensor([segments + [PAD_SEGMENT] * padding], dtype=torch.int32)
    weights = torch.rand(1, length, generator=generator) * (segment_ids % 100_000 != 10_000) * (segment_ids < 100_000)
    crops = torch.randint(1, 3, (visuals,), generator=generator)
    starts = [0, *crops.cumsum(0).tolist()]
    pooling = [
        torch.randint(starts[i] * CONFIG.patches_per_crop, starts[i + 1] * CONFIG.patches_per_crop, (TOKENS, 4),
                      generator=generator)
        for i in range(visuals)
    ]  # fmt: skip
    return Batch(
        input_ids=input_ids,
        labels=torch.randint(0, CONFIG.text.vocab_size, (1, length), generator=generator),
        loss_weights=weights * (not weightless),
        position_ids=torch.tensor([positions + [0] * padding]),
        segment_ids=segment_ids,
        is_visual=input_ids >= CONFIG.text.vocab_size,
        dataset_ids=torch.zeros(1, length, dtype=torch.int64),
        pixels=torch.randint(0, 256, (int(crops.sum()), CONFIG.crop_size, CONFIG.crop_size, 3),
                             generator=generator, dtype=torch.uint8),
        pooling=torch.cat([*pooling, torch.zeros(0, 4, dtype=torch.int64)]),
        visual_crops=crops,
        visual_tokens=torch.full((visuals,), TOKENS),
        step=0,
        slots=(0,),
        divisor=divisor,
        cursor=Cursor(step=0, window=0, offset=0),
        masked=(),
    )  # fmt: skip


BATCHES = [(1, 2, False), (2, 0, False), (3, 3, False), (4, 1, True)]  # seed, visuals, no loss


def make(case: tuple[int, int, bool]) -> Batch:
    return batch(case[0], case[1], weightless=case[2])


def gradients(how: tuple[str, tuple[int, int], float]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of each batch with the sequence split over all ranks, averaged as DeepSpeed does.

    `how`: what is recomputed (crops are then taken one at a time), the heads of `model`, and the dropout.
    """
    level, heads, dropout = how
    mesh = make_mesh(dist.get_world_size())
    results = []
    for case in BATCHES:
        module = TrainingModule(model(heads), recipe(sp=mesh.sp, residual_dropout=dropout), mesh).train()
        module.model.set_recompute(level, chunk_crops=None if level == "none" else 1)
        loss, logged = module(module.place(own_crops(make(case), mesh.sp_rank, mesh.sp)))
        loss.backward()
        logged = torch.cat([value.flatten() for value in logged])
        dist.all_reduce(logged)
        for parameter in module.model.parameters():
            assert parameter.grad is not None  # every hook fires on every rank
            dist.all_reduce(parameter.grad)
            parameter.grad /= mesh.world
        results.append((logged, {name: p.grad for name, p in module.model.named_parameters()}))
    return results  # type: ignore[return-value]


RATE = 2.0**20  # a weight's change is this times its gradient, beside which the weight itself vanishes


class GradientDescent(torch.optim.SGD):
    """An optimizer that makes the engine's gradients readable: weights fall by RATE * gradient, whatever ZeRO does.

    DeepSpeed's own `safe_get_full_grad` has none for a trainer that accumulates gradients itself.
    """

    def __init__(self, groups: list[dict[str, Any]], *, partitioned: bool, **options: Any) -> None:
        super().__init__([{**group, "lr": RATE} for group in groups])


def engine_gradients(cases: list[tuple[int, tuple[int, int]]]) -> list[dict[str, Tensor]]:
    """For each (ZeRO stage, heads): gradients of one step over all batches from the engine, with sp 2; float64."""
    return [step_gradients(recipe(zero_stage=stage, sp=2), model(heads)) for stage, heads in cases]


def compiled_gradients(cases: list[tuple[int, int, bool | None, str]]) -> list[tuple[dict[str, Tensor], int, int]]:
    """For each (ZeRO stage, sp, compile, backend): gradients likewise, with numbers of graphs and of graph breaks."""
    from molmo2.model import regions

    results, compile_regions = [], regions.compile_regions
    for stage, sp, compile_them, backend in cases:
        torch._dynamo.reset()
        counters.clear()
        graphs = CompileCounterWithBackend(backend)
        with mock.patch.object(regions, "compile_regions", partial(compile_regions, backend=graphs)):
            gradients = step_gradients(
                recipe(zero_stage=stage, sp=sp, compile=compile_them, recompute="light"), model()
            )
        results.append((gradients, graphs.frame_count, len(counters["graph_break"])))
    return results


def gradients_of_visual_first(cases: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """For each (ZeRO stage, sp): gradients of a step with visual tokens first."""
    return [step_gradients(recipe(zero_stage=stage, sp=sp, visual_first=True), model()) for stage, sp in cases]


def step_gradients(run: Recipe, start: Molmo2) -> dict[str, Tensor]:
    """Gradients of one step over all batches from the engine, float64."""
    mesh = make_mesh(run.train.sp)
    before = {name: parameter.detach().double() for name, parameter in start.named_parameters()}
    with mock.patch.object(engine_file, "ComponentAdamW", GradientDescent):
        engine, _, _ = start_engine(start, run, mesh)
    for number in range(mesh.dp_rank, len(BATCHES), mesh.dp):
        loss, _ = engine(engine.module.place(own_crops(make(BATCHES[number]), mesh.sp_rank, mesh.sp)))
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    parameters = dict(engine.module.model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=run.train.zero_stage == 3):
        gradients = {name: (before[name] - p.detach().double()) / RATE for name, p in parameters.items()}
    engine.destroy()
    return gradients


class Collectives(TorchDispatchMode):
    """Counts all collectives by the names that torch has for them, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(level: str) -> tuple[Counter[str], Counter[str]]:
    """Collectives of forward and of backward of one batch, with the sequence split over all ranks."""
    mesh = make_mesh(dist.get_world_size())
    module = TrainingModule(model(), recipe(sp=mesh.sp), mesh).train()
    module.model.set_recompute(level)
    own = module.place(own_crops(make(BATCHES[0]), mesh.sp_rank, mesh.sp))
    with Collectives() as forward:
        loss, _ = module(own)
    with Collectives() as backward:
        loss.backward()
    return forward.counts, backward.counts


class Step(NamedTuple):
    """The loss of a step over all ranks, and the gradient norm of each component."""

    loss: float
    norms: dict[str, float]


def train(settings: list[tuple[Any, ...]]) -> list[list[Step]]:
    """For each (precision, ZeRO stage, sp, base embedding frozen, offload …): two steps."""
    results = []
    for precision, stage, sp, frozen, *offload in settings:
        name = "-".join(map(str, (precision, stage, sp, frozen, *offload)))
        run = recipe(name, frozen, precision=precision, zero_stage=stage, sp=sp, steps=2, offload=offload)
        mesh = make_mesh(sp)
        engine, optimizer, names = start_engine(model(), run, mesh)
        steps = []
        for step in range(1, 3):
            set_learning_rates(optimizer, names, run.optim, step, 2)
            total = torch.zeros(1, dtype=torch.float64)
            for number in range(mesh.dp_rank, len(BATCHES), mesh.dp):
                loss, _ = engine(engine.module.place(own_crops(make(BATCHES[number]), mesh.sp_rank, mesh.sp)))
                engine.backward(loss, scale_wrt_gas=False)
                total += loss.item() / mesh.world
            engine.step()
            assert engine.was_step_applied()
            dist.all_reduce(total)
            steps.append(Step(total.item(), {name: norm.item() for name, norm in optimizer.norms.items()}))
        save(engine, run, CONFIG, 2, {}, sp=sp)
        results.append(steps)
        engine.destroy()
    return results


class Frozen(NamedTuple):
    """A step with frozen components on one rank: the groups with states, bytes of states, and what each part moved."""

    groups: list[str]
    state_bytes: int
    moved: dict[str, bool]


def train_frozen(settings: list[tuple[int, tuple[str, ...], tuple[str, ...]]]) -> list[Frozen]:
    """One step on each rank for each (ZeRO stage, frozen components, offload)."""
    results = []
    for stage, freeze, offload in settings:
        run = recipe(f"frozen-{stage}", zero_stage=stage, steps=1, freeze=freeze, offload=offload)
        mesh, before = make_mesh(1), model().parameter_groups()
        engine, optimizer, names = start_engine(model(), run, mesh)
        set_learning_rates(optimizer, names, run.optim, 1, 1)
        loss, _ = engine(engine.module.place(make(BATCHES[mesh.dp_rank])))
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.numel() > 1]
        moved = {}
        for name, parameters in engine.module.model.parameter_groups().items():
            with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
                pairs = zip(parameters, before[name], strict=True)
                moved[name] = any(not torch.equal(after, first) for after, first in pairs)
        results.append(Frozen(names, sum(tensor.nbytes for tensor in states), moved))
        engine.destroy()
    return results


def losses_in_8_bits(cases: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """For each (ZeRO stage, sp): the losses of all batches before and after two steps on them."""
    results = []
    for stage, sp in cases:
        mesh, run = make_mesh(sp), recipe(zero_stage=stage, sp=sp, precision="bf16", fp8=True)
        engine, optimizer, names = start_engine(model(), run, mesh)
        totals = []
        for step in range(1, 4):
            set_learning_rates(optimizer, names, run.optim, step, 3)
            total = torch.zeros(1)
            for number in range(mesh.dp_rank, len(BATCHES), mesh.dp):
                loss, _ = engine(engine.module.place(own_crops(make(BATCHES[number]), mesh.sp_rank, mesh.sp)))
                engine.backward(loss, scale_wrt_gas=False)
                total += loss.detach()
            engine.step()
            dist.all_reduce(total)
            totals.append(total.item() / mesh.world)
        results.append((totals[0], totals[-1]))
        engine.destroy()
    return results


def train_alone() -> tuple[Molmo2, list[Step]]:
    """The same two steps in one process, without DeepSpeed."""
    from molmo2.training.optim import ComponentAdamW, parameter_groups

    run = recipe()
    module = TrainingModule(model(), run, SINGLE).train()
    options = {"betas": run.optim.betas, "eps": run.optim.eps, "weight_decay": run.optim.weight_decay}
    groups = parameter_groups(module.model.parameter_groups(), run.optim)
    optimizer = ComponentAdamW(groups, partitioned=False, **options)
    steps = []
    for step in range(1, 3):
        total = 0.0
        set_learning_rates(optimizer, [group["name"] for group in groups], run.optim, step, 2)
        optimizer.zero_grad()
        for case in BATCHES:
            loss = module(module.place(make(case)))[0]
            loss.backward()
            total += loss.item()
        optimizer.step()
        steps.append(Step(total, {name: norm.item() for name, norm in optimizer.norms.items()}))
    return module.model, steps


def start(argument: tuple[str, Any]) -> Any:
    """Entry of the ranks: the data root, then the settings of `train`."""
    import os

    os.environ["MOLMO2_DATA"], settings = argument
    Path(argument[0]).mkdir(exist_ok=True)
    return train(settings)
