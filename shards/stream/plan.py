"""The plan: batches as a pure function of (indexes, recipe, seed, cursor).

    mixture  ->  the draws of a window of virtual time
    order    ->  the sample of each draw
    packing  ->  the packs of the window's draws, shuffled by the seed
    steps    ->  the next `packs_per_step` packs, across window borders

The plan reads no shard and keeps no buffer. The cursor is its whole state; a resume computes one window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.storage.base import read_threads
from shards.stream.dataset import Dataset, check_processor, find_dataset, setting_differences
from shards.stream.mixture import MixtureSpec, draws_before, integer_weights, phase
from shards.stream.order import epoch_keys, key_of, permute, shuffled
from shards.stream.packing import pack

PLAN_VERSION = 2  # 2: packs of like cost
Array = npt.NDArray[Any]


class PlanError(ValueError):
    """A plan cannot be made, or a saved state belongs to another plan."""


class Draw(NamedTuple):
    """One sample of a pack: its place, byte range and checksum, and lengths of its `variant`. Reading needs no index.

    `dataset` is an index into `Plan.datasets`, `shard` one into the dataset's shards; offset, span, xxh64: see
    `format.index_dtype`.
    """

    dataset: int
    shard: int
    row: int
    variant: int
    offset: int
    span: int
    xxh64: int
    num_tokens: int
    num_crops: int
    loss_weight: float
    num_pairs: float = 0.0


class PackSizes(NamedTuple):
    """Sums over the samples of a pack; `pairs`: (query, key) pairs of tokens that the attention mask allows."""

    tokens: int
    crops: int
    pairs: float


class PackSpec(NamedTuple):
    """The samples of one sequence, which is slot `slot` of step `step`."""

    step: int
    slot: int
    draws: tuple[Draw, ...]

    @property
    def sizes(self) -> PackSizes:
        """The sizes that determine what the pack costs to compute."""
        tokens, crops, pairs = zip(*((d.num_tokens, d.num_crops, d.num_pairs) for d in self.draws), strict=True)
        return PackSizes(sum(tokens), sum(crops), sum(pairs))


class Cursor(NamedTuple):
    """The state of the data: number of steps done, and the next pack (its window, and its number in the window)."""

    step: int = 0
    window: int = 0
    offset: int = 0


class StepSpec(NamedTuple):
    """One optimizer step. `divisor` is the sum of loss weights over all its packs; `cursor` is the state after it."""

    step: int
    packs: tuple[PackSpec, ...]
    divisor: float
    cursor: Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """Settings that determine the order of batches, together with the datasets and the mixture.

    `window`: length of a window in virtual time, about its number of draws; `packs_per_step`: packs of a global batch.
    """

    sequence_length: int
    max_crops: int
    packs_per_step: int
    window: int = 4096
    seed: int = 0


class Plan:
    """The batches of a run. Two plans with equal arguments give equal steps on any machine."""

    def __init__(self, datasets: Sequence[Dataset], mixture: MixtureSpec, settings: PlanSettings) -> None:
        """Make a plan, and check that every sample fits into a pack.

        Raises:
            PlanError: a sample is longer than the sequence or has too many crops.
            MixtureError: a dataset is empty, or its share rounds to 0.
        """
        datasets = sorted(datasets, key=lambda dataset: dataset.name)  # so that the order in a recipe does not matter
        self.datasets, self.settings = tuple(datasets), settings
        weights = integer_weights(mixture, {dataset.name: len(dataset) for dataset in datasets})
        self.weights = {dataset.name: weights[dataset.name] for dataset in datasets}
        self._phases = {dataset.name: phase(settings.seed, dataset.name) for dataset in datasets}
        self._sizes = np.array([len(dataset) for dataset in datasets])
        keys = [key_of("order", settings.seed, dataset.name) for dataset in datasets]
        self._order_keys = np.array(keys, np.uint64)
        for dataset in datasets:
            _check_lengths(dataset, settings)
        # A step often ends inside a window, and the next one begins there.
        self._window = functools.lru_cache(maxsize=4)(self._compute_window)

    def step(self, cursor: Cursor) -> StepSpec:
        """The step that begins at a cursor.

        Raises:
            PlanError: the loss weights of the step sum to 0.
        """
        packs: list[tuple[Draw, ...]] = []
        window, offset = cursor.window, cursor.offset
        while len(packs) < self.settings.packs_per_step:
            taken = self._window(window)[offset : offset + self.settings.packs_per_step - len(packs)]
            packs += taken
            offset += len(taken)
            if offset >= len(self._window(window)):
                window, offset = window + 1, 0
        divisor = math.fsum(draw.loss_weight for draws in packs for draw in draws)
        if divisor <= 0:
            raise PlanError(
                f"step {cursor.step}: no sample has a loss weight; check `loss_weight` in the catalog, and converters"
            )
        specs = tuple(PackSpec(cursor.step, slot, draws) for slot, draws in enumerate(packs))
        return StepSpec(cursor.step, specs, divisor, Cursor(cursor.step + 1, window, offset))

    def draws_until(self, window: int) -> dict[str, int]:
        """Number of draws of every dataset before a window begins."""
        time = window * self.settings.window
        return {name: draws_before(time, weight, self._phases[name]) for name, weight in self.weights.items()}

    def draws_at(self, cursor: Cursor) -> dict[str, int]:
        """Number of draws of every dataset before a cursor, those in the window under way included."""
        draws = self.draws_until(cursor.window)
        begun = self._window(cursor.window)[: cursor.offset] if cursor.offset else ()
        for members in begun:
            for draw in members:
                draws[self.datasets[draw.dataset].name] += 1
        return draws

    def identity(self) -> dict[str, Any]:
        """Everything that determines the order of batches, as a JSON value."""
        return {
            "plan_version": PLAN_VERSION,
            "datasets": {dataset.name: dataset.index.digest for dataset in self.datasets},
            "weights": self.weights,
            "settings": asdict(self.settings),
        }

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """State for a checkpoint, as a JSON value: the cursor and the identity of the plan."""
        return {"cursor": cursor._asdict(), "identity": self.identity()}

    def restore(self, state: dict[str, Any]) -> Cursor:
        """The cursor of a saved state, after a check that it belongs to this plan.

        Raises:
            PlanError: the state belongs to another plan; every difference is listed.
        """
        changed = setting_differences(self.identity(), _saved_identity(state))
        if changed:
            listed = "\n  ".join(changed)
            raise PlanError(
                f"the data has changed since the checkpoint:\n  {listed}\n"
                "to resume, restore the data and settings that the checkpoint was made with; or start a new run from "
                "its weights (init), or accept the new data (train.py --change-data)"
            )
        return Cursor(**state["cursor"])

    def change_over(self, state: dict[str, Any]) -> tuple[Cursor, list[str]]:
        """The cursor at which this plan continues the run of another plan's saved state, and the differences.

        The cursor is at the same virtual time, at the start of the first window after the current one: the packs left
        in the current window are skipped. Each dataset continues at the draw that this plan gives for that time.
        """
        cursor, old = Cursor(**state["cursor"]), _saved_identity(state)
        changed = setting_differences(self.identity(), old)
        if not changed:
            return cursor, []
        time = (cursor.window + (cursor.offset > 0)) * old["settings"]["window"]
        return Cursor(cursor.step, -(-time // self.settings.window), 0), changed

    def window_draws(self, window: int) -> list[Draw]:
        """The draws of a window, dataset by dataset."""
        before = np.array(list(self.draws_until(window).values()))
        counts = np.array(list(self.draws_until(window + 1).values())) - before
        ends = np.cumsum(counts)
        number = np.repeat(np.arange(len(counts)), counts)
        drawn = np.arange(ends[-1]) + np.repeat(before - ends + counts, counts)  # number of the draw within its dataset
        epochs, positions = np.divmod(drawn, self._sizes[number])
        keys = epoch_keys(self._order_keys[number], epochs)
        ordinals = permute(positions, self._sizes[number], keys)
        draws: list[Draw] = []
        for i in np.flatnonzero(counts).tolist():
            part = slice(int(ends[i] - counts[i]), int(ends[i]))
            draws += draws_of(self.datasets[i], ordinals[part], epochs[part], number=i)
        return draws

    def _compute_window(self, window: int) -> list[tuple[Draw, ...]]:
        """All packs of a window, in the order of training."""
        draws = self.window_draws(window)
        tokens = np.array([draw.num_tokens for draw in draws], np.int64)
        crops = np.array([draw.num_crops for draw in draws], np.int64)
        weights = np.array([draw.loss_weight for draw in draws], np.float64)
        too_long = (tokens > self.settings.sequence_length) | (crops > self.settings.max_crops)
        if (odd := np.flatnonzero(too_long | ~((weights >= 0) & np.isfinite(weights)))).size:
            draw = draws[odd[0]]
            raise PlanError(
                f"{self.datasets[draw.dataset].name}, shard {draw.shard}, sample {draw.row}: {draw.num_tokens} tokens, "
                f"{draw.num_crops} crops and a loss weight of {draw.loss_weight} cannot be; run tools/verify_shards.py"
            )
        pairs = np.array([draw.num_pairs for draw in draws], np.float64).astype(np.int64)
        packs = pack(tokens, crops, pairs, self.settings.sequence_length, self.settings.max_crops)
        order = shuffled(len(packs), key_of("packs", self.settings.seed, window)).tolist()
        # Packing sorts samples by length; inside a pack they are shuffled.
        place = shuffled(len(draws), key_of("members", self.settings.seed, window)).tolist()
        return [tuple(draws[i] for i in sorted(packs[number], key=place.__getitem__)) for number in order]


def draws_of(dataset: Dataset, ordinals: Array, epochs: Array | int = 0, number: int = 0) -> list[Draw]:
    """Draws of one dataset. The text variant of a sample changes with the epoch; its key hash gives the first one.

    Args:
        dataset: the dataset.
        ordinals: (N,) int64, each sample's number in the order of the shards.
        epochs: (N,) int64, or one for all, in which the samples are drawn.
        number: the dataset's index in the plan.
    """
    shard, row, entries = dataset.lookup(ordinals)
    variant = (epochs + entries["key_hash"]) % dataset.index.num_variants
    samples = np.arange(len(row))
    columns = [shard, row, variant, entries["offset"], entries["span"], entries["xxh64"]]
    columns += [entries[field][samples, variant] for field in ("num_tokens", "num_crops", "loss_weight", "num_pairs")]
    return [Draw(number, *values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _saved_identity(state: dict[str, Any]) -> dict[str, Any]:
    """The identity in a saved state. States of earlier versions have `block`, whose default 1 is the order of today."""
    identity: dict[str, Any] = state["identity"]
    return identity | {"settings": {k: v for k, v in identity["settings"].items() if (k, v) != ("block", 1)}}


def _check_lengths(dataset: Dataset, settings: PlanSettings) -> None:
    shards = dataset.index.shards
    limits = {
        "num_tokens": (settings.sequence_length, max((shard.max_tokens for shard in shards), default=0)),
        "num_crops": (settings.max_crops, max((shard.max_crops for shard in shards), default=0)),
    }
    for field, (limit, most) in limits.items():
        if most > limit:
            above = sum(int(np.count_nonzero((rows[field] > limit).any(axis=1))) for rows in dataset.sidecars)
            raise PlanError(
                f"dataset {dataset.name}: {above} of {len(dataset)} samples have more than {limit} {field[4:]} "
                f"(at most {most}); raise the recipe's limit, or build the shards for this one"
            )


def open_plan(
    roots: Sequence[str], mixture: MixtureSpec, settings: PlanSettings, processor: dict[str, Any] | None = None
) -> Plan:
    """Open every dataset of a mixture from the first root that has it, and make the plan.

    `processor`: settings of the recipe's processor, which the shards must have been built with; None skips the check.

    Raises:
        DatasetError, FormatError, MixtureError, PlanError: see there.
    """
    opened = read_threads().map(lambda name: find_dataset(tuple(roots), name), mixture.dataset_names)
    datasets = list(opened)  # waits until all sidecars are read and hashed
    if processor is not None:
        for dataset in datasets:
            check_processor(dataset, processor)
    return Plan(datasets, mixture, settings)
