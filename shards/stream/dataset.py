"""An opened dataset: its index, and its sidecars as memory-mapped arrays, for look-ups by sample number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shards.format import INDEX_NAME, DatasetIndex, index_dtype, parse_index
from shards.storage.base import Storage
from shards.storage.local import LocalStorage
from shards.storage.open import open_storage
from shards.stream.sidecars import load_sidecars

Array = npt.NDArray[Any]


class DatasetError(ValueError):
    """A dataset is missing, unfinished, or was built for another processor."""


class TarCache(Protocol):
    """What `Tars` asks of `shards.stream.cache.ShardCache`."""

    def read(self, storage: Storage, name: str, size: int, sha256: str, offset: int, length: int) -> bytes:
        """A range of a tar, from the cache or from `storage`."""

    def has(self, sha256: str) -> bool:
        """Whether a tar is cached."""

    def forget(self, sha256: str) -> None:
        """Drop a tar whose cached bytes were wrong."""


@dataclass(frozen=True, slots=True)
class Tars:
    """The part of a dataset that a reader needs. It is small enough to be pickled to workers, unlike the sidecars.

    `whole`: size in bytes and SHA-256 of every tar if `cache` is used; without a cache it is empty.
    """

    name: str
    storage: Storage
    shards: tuple[str, ...]
    cache: TarCache | None = None
    whole: tuple[tuple[int, str], ...] = ()

    def is_near(self, shard: int) -> bool:
        """Whether a tar is on a disk of this machine now, so that a read ends before a thread would start."""
        cached = self.cache is not None and self.cache.has(self.whole[shard][1])
        return cached or isinstance(self.storage, LocalStorage)

    def read(self, shard: int, offset: int, length: int, *, past_cache: bool) -> bytes:
        """Read a byte range of a tar; `past_cache` drops the cached shard first, because its bytes were wrong."""
        name = f"{self.shards[shard]}.tar"
        if self.cache is None:
            return self.storage.read(name, offset, length)
        size, sha256 = self.whole[shard]
        if past_cache:
            self.cache.forget(sha256)
            return self.storage.read(name, offset, length)
        return self.cache.read(self.storage, name, size, sha256, offset, length)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A finished dataset. `ends[i]` is the number of samples up to and with shard i."""

    name: str
    storage: Storage
    index: DatasetIndex
    sidecars: tuple[Array, ...]
    ends: Array

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def tars(self) -> Tars:
        """The location of the samples' bytes."""
        return Tars(self.name, self.storage, tuple(shard.name for shard in self.index.shards))

    def lookup(self, ordinals: Array) -> tuple[Array, Array, Array]:
        """Look up samples by their number through all shards: shard, row in the shard, and sidecar row, [n] each."""
        shard = np.searchsorted(self.ends, ordinals, side="right")
        row = ordinals - np.append(0, self.ends)[shard]
        entries = np.empty(len(ordinals), index_dtype(self.index.num_variants))
        order = np.argsort(shard, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            entries[part] = self.sidecars[shard[part[0]]][row[part]]
        return shard, row, entries


def open_dataset(root: str, name: str) -> Dataset:
    """Open `root`/`name`.

    Raises:
        DatasetError: the dataset does not exist, or its build has not finished.
        FormatError: the index or a sidecar is damaged, or has another format version.
    """
    storage = open_storage(f"{root.rstrip('/')}/{name}")
    where = f"{storage.root}/{INDEX_NAME}"
    try:
        index = parse_index(storage.read(INDEX_NAME), where)
    except FileNotFoundError:
        raise DatasetError(
            f"{where} does not exist: dataset {name} is not built, or its build has not finished; "
            "run tools/build_shards.py for its stage (finished shards are kept)"
        ) from None
    sidecars = load_sidecars(storage, index)
    ends = np.cumsum([len(rows) for rows in sidecars], dtype=np.int64)
    return Dataset(name, storage, index, sidecars, ends)


def find_dataset(roots: tuple[str, ...], name: str) -> Dataset:
    """Open a dataset from the first root in which its build is finished.

    Raises:
        DatasetError: no root has it.
    """
    for root in roots:
        if open_storage(f"{root.rstrip('/')}/{name}").size(INDEX_NAME) is not None:
            return open_dataset(root, name)
    raise DatasetError(
        f"dataset {name} is in none of {', '.join(roots)} (no finished {INDEX_NAME}); "
        "build it with tools/build_shards.py, or take it out of the recipe's mixture"
    )


def setting_differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """The differences of two JSON values: a line per dotted path, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        parts = (setting_differences(found.get(k), wanted.get(k), f"{path}.{k}" if path else str(k)) for k in keys)
        return [line for part in parts for line in part]
    # A tuple becomes a list in JSON, so the two are equal.
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple) and list(found) == list(wanted):
        return []
    return [] if found == wanted else [f"{path}: {found!r}, wanted {wanted!r}"]


def check_processor(dataset: Dataset, wanted: dict[str, Any]) -> None:
    """Check that a dataset was built with these settings of the processor.

    Raises:
        DatasetError: a setting differs; every difference is listed with both values.
    """
    changed = setting_differences(dataset.index.processor, wanted)
    if changed:
        listed = "\n  ".join(changed)
        raise DatasetError(
            f"{dataset.storage.root} was built by another processor than the recipe's:\n  {listed}\n"
            "rebuild it with tools/build_shards.py --overwrite, or use the model and tokenizer it was built for"
        )
