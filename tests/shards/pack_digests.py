"""Digests of the packs of a batch, to compare batches that hold the same packs in another arrangement."""

import hashlib

import torch
from toy import LAYOUT

from shards.stream.collate import Batch


def by_slot(batch: Batch) -> dict[int, str]:
    """A digest of everything that a pack brings, whichever batch it travels in."""
    found: dict[int, str] = {}
    tokens = (batch.input_ids == LAYOUT.tokens.im_patch).sum(dim=1).tolist()
    token = crop = visual = 0
    for row, slot in enumerate(batch.slots):
        fields = (batch.input_ids, batch.labels, batch.loss_weights, batch.position_ids, batch.segment_ids)
        parts = [field[row].numpy().tobytes() for field in fields]
        pooling = batch.pooling[token : token + tokens[row]]
        first = crop
        while token < sum(tokens[: row + 1]):
            token += int(batch.visual_tokens[visual])
            crop += int(batch.visual_crops[visual])
            visual += 1
        own = torch.where(pooling >= 0, pooling - first * LAYOUT.crop_patches**2, -1)
        width = int((own >= 0).any(dim=0).sum())  # wider where another pack of the batch pools more
        parts += [batch.pixels[first:crop].numpy().tobytes(), own[:, :width].numpy().tobytes()]
        found[slot] = hashlib.sha256(b"".join(parts)).hexdigest()
    return found
