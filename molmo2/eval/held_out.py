"""The loss of held-out rows, of any dataset: rows -> samples as for training -> the mean weighted cross entropy.

One example is one sequence; variants are not drawn, prompts have the form of stage "eval". Shards are not needed:
`molmo2/held_out.py` judges a run by those while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from molmo2.eval.answers import Line, Store
from molmo2.eval.runner import ALONE, STAGE, Ranks, Subject, read_examples
from molmo2.loss import rows_per_chunk, weighted_loss
from molmo2.model.mask import AttentionMask
from shards.catalog import Catalog
from shards.collate import Batch, collate, decode_crops, open_sample
from shards.layout import VisualLayout, expand, sample_visuals, visual_crops
from shards.plan import Cursor, Draw, PackSpec
from shards.reader import StoredSample
from shards.schema import Example, RejectedError, Sample

REJECTS_SHOWN = 3


def as_batch(layout: VisualLayout, sample: Sample) -> Batch:
    """A batch of this sample alone, as the loader makes it of a shard."""
    images = {number: memoryview(data) for number, data in enumerate(sample.images)}
    visuals = sample_visuals(sample.record, 0)
    stored = StoredSample(key=sample.key, tokens=sample.variants[0], visuals=visuals, images=images)
    length = len(expand(layout, stored.tokens, visuals).input_ids)
    draw = Draw(0, 0, 0, 0, 0, 0, 0, length, sum(map(visual_crops, visuals)), 0.0)
    opened = open_sample(layout, draw, stored)
    crops = decode_crops(layout, opened.stored, range(len(visuals)))
    return collate(layout, [PackSpec(0, 0, (draw,))], [opened], crops, length, 1.0, Cursor())


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


def _scored(subject: Subject, catalog: Catalog, examples: list[Example], name: str) -> Iterator[Line]:
    limits = catalog.stages[STAGE].limits
    for example in tqdm(examples, desc=f"{name}: loss", unit="ex", leave=False):
        try:
            batch = as_batch(subject.processor.layout, subject.processor(example, limits))
        except RejectedError as error:
            yield Line(example.key, json.dumps({"rejected": str(error)}))
            continue
        total, weight = sums_of(subject, batch)
        yield Line(example.key, json.dumps({"loss": total, "weight": weight}))


def held_out_loss(
    dataset: str,
    catalog: Catalog,
    raw: Path,
    subject: Subject,
    answers: Path,
    checkpoint: str,
    *,
    limit: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Mean weighted cross entropy over the first `limit` examples of a dataset's evaluation rows.

    Arguments are those of `runner.evaluate`. Resumed in the same way, example by example.

    Returns:
        JSON: loss, weight, num_examples, num_rejected with the first reasons, num_left_out; None but on rank 0.

    Raises:
        ValueError: there is no example, or none with a loss.
        SourceError: the data are not there.
    """
    (row,) = catalog.select(STAGE, [dataset])
    examples = []
    left_out: list[str] = []
    for example, _ in read_examples(row, raw, left_out=left_out):
        examples.append(example)
        if len(examples) == limit:
            break
    settings: Mapping[str, Any] = {
        "checkpoint": checkpoint,
        "processor": subject.processor.settings,
        "row": row.build_settings(),
        "limits": asdict(catalog.stages[STAGE].limits),
    }
    store = Store.of(answers, f"loss-{dataset}", settings)
    known = store.read()
    own = [example for example in examples[ranks.rank :: ranks.world] if example.key not in known]
    with store.writer(ranks.rank) as write:
        for line in _scored(subject, catalog, own, dataset):
            write(line)
    ranks.wait()
    if ranks.rank:
        return None
    found = [json.loads(text) for text in store.take([example.key for example in examples])]
    rejected = [one["rejected"] for one in found if "rejected" in one]
    weight = sum(one["weight"] for one in found if "weight" in one)
    if not weight:
        raise ValueError(f"{dataset}: {len(examples)} examples, {len(rejected)} rejected, none with a loss: {rejected}")
    return {
        "dataset": dataset,
        "loss": sum(one["loss"] for one in found if "loss" in one) / weight,
        "weight": weight,
        "num_examples": len(found) - len(rejected),
        "num_rejected": len(rejected),
        "num_left_out": len(left_out),
        "rejected": rejected[:REJECTS_SHOWN],
    }
