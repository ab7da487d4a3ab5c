"""A local folder that counts as a bucket, for tests of the cache."""

from pathlib import Path
from typing import Any

from shards.storage.local import LocalStorage
from shards.stream.dataset import Dataset, open_dataset
from shards.stream.plan import Draw


class FarStorage:
    """A directory that counts as a bucket."""

    reads = 0

    def __init__(self, root: str) -> None:
        self.root, self.near = root, LocalStorage(root)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        FarStorage.reads += 1
        return self.near.read(name, offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.near, name)


def open_dataset_of(root: Path) -> Dataset:
    """The toy dataset, as if it lay in a bucket."""
    found = open_dataset(str(root), "toy")
    storage = FarStorage(found.storage.root)
    return Dataset(found.name, storage, found.index, found.sidecars, found.ends)


def draws(dataset: Dataset) -> list[Draw]:
    fields = ("offset", "span", "xxh64")
    return [
        Draw(0, shard, row, 0, *(entry[field].item() for field in fields), 0, 0, 0.0)
        for shard, sidecar in enumerate(dataset.sidecars)
        for row, entry in enumerate(sidecar)
    ]
