"""The loss of held-out samples, of any dataset with shards of stage "eval": the mean weighted cross entropy.

One sample is one sequence, in the form of stage "eval". While a run trains, `molmo2.training.validation` computes the
loss of packs of such samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from molmo2.eval.answers import Line, Store
from molmo2.eval.questions import as_batch, draws_of, read_samples
from molmo2.eval.runner import ALONE, Ranks, Subject, left_out, open_built
from molmo2.model.loss import rows_per_chunk, weighted_loss
from molmo2.model.mask import AttentionMask
from shards.stream.collate import Batch
from shards.stream.dataset import Tars
from shards.stream.plan import Draw


@torch.no_grad()
def sums_of(subject: Subject, batch: Batch) -> tuple[float, float]:
    """Weighted cross entropy and weight of all tokens of a batch."""
    model, batch = subject.model, batch.to(subject.device)
    features = model.encode_visuals(batch.pixels, batch.pooling) if len(batch.pixels) else None
    x = model.embed(batch.input_ids, features)
    hidden = model.decode(x, batch.position_ids, AttentionMask(batch.segment_ids, batch.is_visual))
    chunk = rows_per_chunk(model.config.text.vocab_size)
    sums = weighted_loss(hidden, batch.labels, batch.loss_weights, model.lm_head, 0.0, chunk)
    return float(sums.cross_entropy), float(batch.loss_weights.double().sum())


def _scored(subject: Subject, tars: Tars, draws: Sequence[Draw]) -> Iterator[Line]:
    with tqdm(total=len(draws), desc=f"{tars.name}: loss", unit="sample", leave=False) as bar:
        for draw, stored in read_samples(tars, draws):
            total, weight = sums_of(subject, as_batch(subject.processor.layout, draw, stored))
            yield Line(name_of(draw), json.dumps({"loss": total, "weight": weight}))
            bar.update()


def name_of(draw: Draw) -> str:
    """A sample's place in its dataset."""
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

    Arguments are those of `runner.evaluate`. Resumed in the same way, sample by sample.

    Returns:
        JSON: loss, weight, num_samples, num_left_out with the first reasons; None but on rank 0.

    Raises:
        NotBuiltError: the shards are not there.
        ValueError: they are damaged, another processor's, or none of them has a loss.
    """
    dataset = open_built(name, shards, catalog, subject)
    settings = {"checkpoint": checkpoint, "data": dataset.index.digest}
    store, draws = Store.of(answers, f"loss-{name}", settings), draws_of(dataset, limit)
    known = store.read()
    own = [draw for draw in draws[ranks.rank :: ranks.world] if name_of(draw) not in known]
    with store.writer(ranks.rank) as write:
        for line in _scored(subject, dataset.tars, own):
            write(line)
    ranks.wait()
    if ranks.rank:
        return None
    found = [json.loads(text) for text in store.take([name_of(draw) for draw in draws])]
    weight = sum(one["weight"] for one in found)
    if not weight:
        raise ValueError(f"{name}: {len(found)} samples, none with a loss")
    loss = sum(one["loss"] for one in found) / weight
    return {"dataset": name, "loss": loss, "weight": weight, "num_samples": len(found), **left_out(dataset)}
