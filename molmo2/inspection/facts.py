"""Facts about built datasets for reports: counts, histograms, rejects, from indexes, sidecars and lists of rejects.

Samples are in `molmo2.inspection.samples`, the mixture of a recipe in `molmo2.inspection.shares`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.build.claim import BUILD_NAME
from shards.build.verify import find_datasets
from shards.format import INDEX_NAME, REJECTS_NAME, REPORT_NAME, DatasetIndex
from shards.storage.base import Storage
from shards.storage.open import open_storage
from shards.stream.dataset import Dataset, open_dataset
from shards.stream.fill import Fill, expected_fill

MOST_BINS = 24  # maximum number of bins of a histogram


class InspectionError(ValueError):
    """There is no dataset to inspect, or it was built with another tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A histogram of integers: bin i counts those from `first + i * width` to below the next bin's first.

    `most` is the largest value.
    """

    first: int
    width: int
    counts: tuple[int, ...]
    mean: float
    median: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Examples left out for one reason. `omitted`: on purpose; `example`: the first of them, with its place."""

    reason: str
    omitted: bool
    num_examples: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Oddity:
    """Something that was used and may be a mistake: how often, and the key of the first sample.

    `shown`: pictures to show, as (number of the sample, number of its picture).
    """

    kind: str
    number: int
    first: str
    shown: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """The facts about one finished dataset. Its histograms count samples by their tokens, crops and frames.

    Tokens and crops are those of variant 0, as in the index's totals. `frames` is None if no sample has a frame.
    `fingerprint` is the processor's. `fill` is None for a dataset of evaluation.
    """

    name: str
    index: DatasetIndex
    fingerprint: str
    tokens: Histogram
    crops: Histogram
    frames: Histogram | None
    reasons: tuple[Reason, ...]
    oddities: tuple[Oddity, ...]
    fill: Fill | None

    @property
    def num_faults(self) -> int:
        """Number of examples that were rejected because of an error."""
        return sum(reason.num_examples for reason in self.reasons if not reason.omitted)

    @property
    def num_omitted(self) -> int:
        """Number of examples that the catalog leaves out on purpose."""
        return sum(reason.num_examples for reason in self.reasons if reason.omitted)


@dataclass(frozen=True, slots=True)
class DatasetFolders:
    """The datasets below a folder: finished ones by stage, and the folders of unfinished builds."""

    stages: dict[str, tuple[Dataset, ...]]
    unfinished: tuple[str, ...]


def find(where: str) -> DatasetFolders:
    """Find the datasets in a folder or bucket: that of a dataset, of a stage, or of all stages.

    Raises:
        InspectionError: there is no finished dataset.
        FormatError: an index or sidecar is damaged.
    """
    folders = find_datasets(where if "://" in where else os.path.abspath(where))
    finished = [folder for folder in folders if open_storage(folder).size(INDEX_NAME) is not None]
    begun = [folder for folder in folders if open_storage(folder).size(BUILD_NAME) is not None]
    unfinished = tuple(folder for folder in begun if folder not in finished)
    if not finished:
        begun_here = f"; not finished: {', '.join(unfinished)}" if unfinished else ""
        raise InspectionError(
            f"{where}: no dataset there (no {INDEX_NAME} in it or below){begun_here}; "
            "give the folder of a dataset, of a stage or of all shards, or build one with tools/build_shards.py"
        )
    stages: dict[str, list[Dataset]] = defaultdict(list)
    for folder in finished:
        parent, _, name = folder.rpartition("/")
        dataset = open_dataset(parent or "/", name)
        stages[dataset.index.stage].append(dataset)
    return DatasetFolders({stage: tuple(datasets) for stage, datasets in stages.items()}, unfinished)


def facts_of(dataset: Dataset) -> DatasetFacts:
    """The facts about a dataset; no sample is read for them."""
    index = dataset.index
    frames = _column(dataset, "num_frames")
    return DatasetFacts(
        name=dataset.name,
        index=index,
        fingerprint=index.processor_fingerprint,
        tokens=histogram(_column(dataset, "num_tokens")),
        crops=histogram(_column(dataset, "num_crops")),
        frames=histogram(frames) if frames.any() else None,
        reasons=reasons_of(dataset.storage, index.totals.rejects),
        oddities=oddities_of(dataset.storage),
        fill=expected_fill(dataset),
    )


def _column(dataset: Dataset, name: str) -> npt.NDArray[np.int64]:
    """A column of all sidecars, for variant 0: int64 [samples]."""
    columns = [rows[name] if rows[name].ndim == 1 else rows[name][:, 0] for rows in dataset.sidecars]
    return np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)


def histogram(values: npt.NDArray[np.int64], most_bins: int = MOST_BINS) -> Histogram:
    """A histogram of at most `most_bins` bins of equal integer width; it is empty if there are no values."""
    if not len(values):
        return Histogram(first=0, width=1, counts=(), mean=0.0, median=0, most=0)
    first, most = int(values.min()), int(values.max())
    width = -(-(most - first + 1) // most_bins)
    counts = np.bincount((values - first) // width)
    return Histogram(
        first=first,
        width=width,
        counts=tuple(counts.tolist()),
        mean=float(values.mean()),
        median=int(np.median(values)),
        most=most,
    )


def reasons_of(storage: Storage, expected: int) -> tuple[Reason, ...]:
    """A dataset's rejects by reason, the most frequent first; rejects missing from the list have their own reason."""
    try:
        lines = storage.read(REJECTS_NAME).splitlines()
    except FileNotFoundError:
        lines = []
    reasons = count_reasons(json.loads(line) for line in lines)
    missing = expected - len(lines)
    if missing:
        reason = f"{REJECTS_NAME} has {len(lines)} lines, the index counts {expected}"
        reasons += (Reason(reason=reason, omitted=False, num_examples=missing, example=""),)
    return reasons


def oddities_of(storage: Storage) -> tuple[Oddity, ...]:
    """The oddities in the report of a dataset's build; empty without a report."""
    try:
        listed = json.loads(storage.read(REPORT_NAME)).get("oddities", {})
    except FileNotFoundError:
        return ()
    return tuple(
        Oddity(
            kind=kind,
            number=found["number"],
            first=found["first"],
            shown=tuple((sample, picture) for sample, picture in found.get("shown", ())),
        )
        for kind, found in listed.items()
    )


def count_reasons(rejects: Iterable[dict[str, Any]]) -> tuple[Reason, ...]:
    """Count rejects by kind: the reason up to its first colon; "filter" and "excluded" also have the column."""
    reasons: dict[tuple[str, bool], Reason] = {}
    for reject in rejects:
        kind = (_kind(reject["reason"]), reject["omitted"])
        example = f"{reject['file']} row {reject['row']}: {reject['reason']}"
        before = reasons.get(kind) or Reason(reason=kind[0], omitted=kind[1], num_examples=0, example=example)
        reasons[kind] = replace(before, num_examples=before.num_examples + 1)
    return tuple(sorted(reasons.values(), key=lambda reason: (reason.omitted, -reason.num_examples, reason.reason)))


def _kind(reason: str) -> str:
    head, colon, rest = reason.partition(": ")
    return f"{head}: {rest.split(' is ')[0]}" if colon and head in {"filter", "excluded"} else head
