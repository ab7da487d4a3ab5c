"""Validation during training: the loss of held-out batches, and greedy answers to a few fixed questions.

All ranks take part in both. The packs of the loss are divided among the ranks as in training. Every forward under
ZeRO-3 is a collective, so each rank generates every answer, and always to the full length: the sequence of collectives
must not depend on what is generated. Validation draws no random number and does not touch the loader of training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from molmo2.config import Evaluation, Recipe, root_paths
from molmo2.model.generate import PromptTensors, generate
from molmo2.parallel.agree import sum_over_ranks, write_line
from molmo2.processing.batch_prompt import prompt_of
from molmo2.processing.pictures import Picture, pictures_of, raster
from molmo2.training.metrics import Monitor
from molmo2.training.run import EVAL_NAME, SAMPLES_NAME, Run, agree_on_masked
from shards.atomic import append_to, write_atomic
from shards.storage.base import take_tally
from shards.stream.dataset import check_processor
from shards.stream.loader import pack_reader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, PackSpec, Plan, StepSpec, open_plan
from shards.stream.read_ahead import MicroSpec
from shards.stream.reader import StoredSample, read_sample

NO_END_TOKEN = -1  # given as the end-of-text id: no model predicts it, so generation runs to the full length


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedSample:
    """A generated answer and the expected one. `pictures`: the visuals of the sample, with the generated points."""

    dataset: str
    key: str
    prompt: str
    answer: str
    expected: str
    pictures: tuple[Picture, ...]


class ValidationSums(NamedTuple):
    """What one rank adds to the held-out losses: a scalar, and vectors over the datasets."""

    masked: Tensor  # number of quarantined samples
    dataset_loss: Tensor  # weighted cross entropy
    dataset_weight: Tensor  # loss weight


def open_held_out(recipe: Recipe, held_out: Evaluation, processor: dict[str, Any]) -> Plan:
    """Open the plan of the held-out batches.

    A recipe of fine-tuning also accepts shards of stage "eval": their prompts are those of fine-tuning without draws.

    Raises:
        DatasetError, FormatError, PlanError: as for the training data.
    """
    names: Any = dict.fromkeys(held_out.datasets)
    mixture = MixtureSpec.model_validate({"groups": {"held out": {"rate": 1, "datasets": names}}})
    plan = open_plan(root_paths(held_out.roots), mixture, recipe.plan_settings)
    for dataset in plan.datasets:
        of_eval = dataset.index.stage == "eval" and recipe.stage != "pretraining"
        check_processor(dataset, {**processor, "conditioning": "eval"} if of_eval else processor)
    return plan


def judge(run: Run, engine: Any, step: int, monitor: Monitor | None) -> None:
    """Run validation: held-out losses go to `eval.jsonl`, generated answers to `samples/`; collective."""
    values, samples = validate(run, engine)
    if monitor is None:
        return
    with append_to(run.recipe.run_dir / EVAL_NAME) as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
    monitor.plot(step, {f"held_out.{name}": value for name, value in values.items()})
    images = write_samples(run.recipe.run_dir, step, samples)
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        text = f"{sample.dataset}/{sample.key}\n\n{sample.prompt}\n\n{sample.answer}\n\n(expected: {sample.expected})"
        monitor.show(step, number, text, image)
    write_line(f"{run.recipe.name}: step {step}, held-out loss {values['loss']:.4f}")


def validate(run: Run, engine: Any) -> tuple[dict[str, float], list[GeneratedSample]]:
    """Held-out losses and scores by name, and generated samples (on rank 0 only); collective.

    The engine is in training mode afterwards.
    """
    assert run.recipe.eval is not None and run.held_out is not None
    engine.eval()
    try:
        with torch.no_grad():
            model = engine.module.model
            values = losses(run, engine, run.held_out) | (run.score(model) if run.score else {})
            return values, list(answers(run, model, run.held_out))
    finally:
        engine.train()
        take_tally()  # what validation has read is no part of the next step's `reads`


def losses(run: Run, engine: Any, plan: Plan) -> dict[str, float]:
    """Mean cross entropy over the first batches of `plan`: "loss", "loss.<dataset>"; "masked" counts samples."""
    assert run.recipe.eval is not None
    mesh, cursor = run.mesh, Cursor()
    reader = pack_reader(plan, run.layout, (mesh.sp_rank, mesh.sp))
    zero = torch.zeros(len(plan.datasets), dtype=torch.float64, device=run.device)
    sums = ValidationSums(zero.new_zeros(()), zero, zero)
    for _ in range(run.recipe.eval.steps):
        step = plan.step(cursor)
        own = step.packs[mesh.dp_rank :: mesh.dp]
        for pack in own:
            batch = reader.read(MicroSpec((pack,), step.divisor, step.cursor))
            batch = agree_on_masked(dataclasses.replace(run, plan=plan), batch, cursor)
            _, logged = engine(engine.module.place(batch, run.device), len(plan.datasets))
            sums = ValidationSums(
                masked=sums.masked + len(batch.masked) / mesh.sp,
                dataset_loss=sums.dataset_loss + logged.dataset_loss,
                dataset_weight=sums.dataset_weight + logged.dataset_weight,
            )
        cursor = step.cursor
    masked, totals, weights = (field.tolist() for field in sum_over_ranks(sums))
    rows = zip(plan.datasets, totals, weights, strict=True)
    means = {f"loss.{dataset.name}": total / weight for dataset, total, weight in rows if weight}
    return {"loss": sum(totals) / max(sum(weights), 1e-9), "masked": masked, **means}


def answers(run: Run, model: Any, plan: Plan) -> Iterator[GeneratedSample]:
    """Generate answers to the first question of some samples, the same samples at every validation."""
    settings, tokenizer = run.recipe.eval, run.tokenizer
    assert settings is not None
    step = plan.step(Cursor())
    reader = pack_reader(plan, run.layout)
    for draw in choose_draws(step, settings.samples):
        pack = PackSpec(0, 0, (draw,))
        question = prompt_of(reader.read(MicroSpec((pack,), step.divisor, step.cursor)))
        missing = torch.tensor(float(question is None), device=run.device)  # damaged, or it holds no answer
        dist.all_reduce(missing)
        if question is None or missing:
            continue
        prompt, expected = question
        (ids,) = generate(model, [PromptTensors.of(prompt, run.device)], settings.max_new_tokens, NO_END_TOKEN)
        tars = plan.datasets[draw.dataset].tars
        stored = read_sample(tars, draw) if run.mesh.rank == 0 else None
        if not isinstance(stored, StoredSample):
            continue
        ids = ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
        answer = tokenizer.decode(ids)
        text_ids = [token for token in prompt.input_ids.tolist() if token < tokenizer.base_vocab]
        yield GeneratedSample(
            dataset=tars.name,
            key=stored.key,
            prompt=tokenizer.decode(text_ids),
            answer=answer,
            expected=tokenizer.decode(expected.tolist()),
            pictures=pictures_of(stored, run.layout, {1: answer}),
        )


def choose_draws(step: StepSpec, count: int) -> list[Draw]:
    """The first `count` draws of a step; the datasets take turns."""
    draws = sorted((draw for pack in step.packs for draw in pack.draws), key=lambda draw: draw.dataset)
    groups = [list(group) for _, group in itertools.groupby(draws, key=lambda draw: draw.dataset)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return [draw for draw in turns if draw is not None][:count]


def write_samples(run_dir: Path, step: int, samples: list[GeneratedSample]) -> list[Image.Image | None]:
    """Write `samples/step-*/`: samples.json, and a picture for each sample with visuals; return the pictures."""
    folder = run_dir / SAMPLES_NAME / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    images = [raster(sample.pictures) for sample in samples]
    lines = []
    for number, (sample, image) in enumerate(zip(samples, images, strict=True)):
        line = {name: getattr(sample, name) for name in ("dataset", "key", "prompt", "answer", "expected")}
        if image is not None:
            image.save(folder / f"{number}.jpg", quality=90)
        lines.append(line | {"picture": None if image is None else f"{number}.jpg"})
    write_atomic(folder / "samples.json", json.dumps(lines, indent=1) + "\n")  # the report reads it after a killed run
    return images
