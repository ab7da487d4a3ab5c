"""The held-out loss of a dataset with shards of stage "eval": its mean weighted cross entropy.

Each sample is a sequence of its own, in the form of stage "eval". During training, `molmo2.training.validation`
computes the loss of packs instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from molmo2.eval.answers import Line, Store
from molmo2.eval.questions import as_batch, first_draws, read_samples
from molmo2.eval.runner import ALONE, Ranks, Subject, left_out, open_built
from molmo2.model.loss import rows_per_chunk, weighted_loss
from molmo2.model.mask import AttentionMask
from molmo2.parallel.gather import take_loss_rows
from molmo2.parallel.mesh import SINGLE
from molmo2.parallel.places import place_batch
from shards.stream.collate import Batch
from shards.stream.dataset import Tars
from shards.stream.plan import Draw


@torch.no_grad()
def loss_sums(subject: Subject, batch: Batch) -> tuple[float, float]:
    """The sums of weighted cross entropy and of loss weights over a batch."""
    model = subject.model
    placed = place_batch(batch, SINGLE, model.config.patches_per_crop, subject.device)
    batch, rows = placed.batch, placed.loss
    features = model.encode_visuals(batch.pixels, batch.pooling) if len(batch.pixels) else None
    x = model.embed(batch.input_ids, features)
    hidden = model.decode(x, batch.position_ids, AttentionMask(batch.segment_ids, batch.is_visual))
    chunk = rows_per_chunk(model.config.text.vocab_size)
    taken = take_loss_rows(hidden, rows, SINGLE)
    sums = weighted_loss(taken, model.lm_head, labels=rows.labels, weights=rows.weights, z_loss=0.0, chunk_rows=chunk)
    return float(sums.cross_entropy), float(batch.loss_weights.double().sum())


def _scored(subject: Subject, tars: Tars, draws: Sequence[Draw]) -> Iterator[Line]:
    with tqdm(total=len(draws), desc=f"{tars.name}: loss", unit="sample", leave=False) as bar:
        for draw, stored in read_samples(tars, draws):
            total, weight = loss_sums(subject, as_batch(subject.processor.layout, draw, stored))
            yield Line(name_of(draw), json.dumps({"loss": total, "weight": weight}))
            bar.update()


def name_of(draw: Draw) -> str:
    """The name of a sample in its dataset: "shard/row"."""
    return f"{draw.shard}/{draw.row}"


def held_out_loss(
    name: str,
    catalog: str,
    shards: str,
    subject: Subject,
    answers: Path,
    checkpoint: str,
    *,
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Mean weighted cross entropy over the first `limit` samples of a dataset of stage "eval".

    The arguments are those of `runner.evaluate`, and it resumes in the same way, sample by sample.

    Returns:
        JSON: loss, weight, num_samples, num_left_out with the commonest reasons; None on other ranks than 0.

    Raises:
        NotBuiltError: the shards have not been built.
        ValueError: the shards are damaged or of another processor, or no sample has a loss.
    """
    dataset = open_built(name, shards, catalog, subject)
    settings = {"checkpoint": checkpoint, "precision": subject.precision, "data": dataset.index.digest}
    store, draws = Store.of(answers, f"loss-{name}", settings), first_draws(dataset, limit)
    known = store.read()
    own = [draw for draw in draws[ranks.rank :: ranks.world] if name_of(draw) not in known]
    with store.writer(ranks.rank) as write:
        for line in _scored(subject, dataset.tars, own):
            write(line)
    ranks.wait()
    if ranks.rank:
        return None
    sums = [json.loads(text) for text in store.take([name_of(draw) for draw in draws])]
    weight = sum(sample["weight"] for sample in sums)
    if not weight:
        raise ValueError(f"{name}: none of its {len(sums)} samples has a loss")
    loss = sum(sample["loss"] for sample in sums) / weight
    return {"dataset": name, "loss": loss, "weight": weight, "num_samples": len(sums), **left_out(dataset)}
