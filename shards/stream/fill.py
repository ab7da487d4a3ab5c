"""How full packs would be with one dataset alone, from the lengths in its sidecars."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shards.stream.dataset import Dataset
from shards.stream.packing import best_fit

WINDOW = 4096  # samples that are packed together, as the window of a recipe has by default


class Fill(NamedTuple):
    """The parts of the tokens and crops of packs that hold data, and the limits of a pack."""

    tokens: float
    crops: float
    max_tokens: int
    max_crops: int

    @property
    def text(self) -> str:
        """A sentence for a report."""
        scarce = "crops run out first" if self.crops > self.tokens else "tokens run out first"
        return (
            f"alone in packs of {self.max_tokens:,} tokens and {self.max_crops} crops it would fill "
            f"{self.tokens:.0%} of the tokens and {self.crops:.0%} of the crops ({scarce})"
        )


def expected_fill(dataset: Dataset) -> Fill | None:
    """The fill of packs with the limits that the dataset's samples were built for; None for evaluation.

    At most `WINDOW` samples, evenly spread over the dataset, are packed in their first text variant.
    """
    if dataset.index.stage == "eval" or not len(dataset):
        return None
    limits = dataset.index.build["settings"]["limits"]
    max_tokens, max_crops = limits["sequence_length"], limits["max_crops"]
    count = min(len(dataset), WINDOW)
    _, _, rows = dataset.lookup(np.arange(count) * len(dataset) // count)
    tokens, crops = (rows[name][:, 0].astype(np.int64) for name in ("num_tokens", "num_crops"))
    packs = len(best_fit(tokens, crops, max_tokens, max_crops))
    return Fill(
        tokens=float(tokens.sum() / (packs * max_tokens)),
        crops=float(crops.sum() / (packs * max_crops)),
        max_tokens=max_tokens,
        max_crops=max_crops,
    )
