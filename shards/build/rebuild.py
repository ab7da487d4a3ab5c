"""The datasets of a stage with narrower limits that a stage builds again, because they lost much to those limits.

Stage 3 reads the shards of stage 2 for images and text. Where many of their samples have fewer crops, or are parts of
a tree, the dataset is built again at the limits of stage 3. The catalog says which stage is read (`rebuilds`).
"""

from __future__ import annotations

from shards.catalog import Catalog, Row, Stage
from shards.format import INDEX_NAME, DatasetIndex, parse_index
from shards.storage.open import open_storage

REBUILD_SHARE = 0.01  # share of changed samples below which building and storing a dataset again is not worth it
LOST = ("shrunk", "parts")  # what wider limits give back; there are never more images


def rows_to_build(catalog: Catalog, stage: Stage, names: list[str] | None, out: str) -> list[tuple[Row, float]]:
    """The rows of a stage, and those that it builds again by the indexes below `out`; with `names` only these rows.

    Each comes with the share of its samples that narrower limits changed: 0 for the stage's own rows.

    Raises:
        CatalogError: see `Catalog.require`.
    """
    again = {row.name: row for row in catalog.rebuilt(stage)}
    own = [name for name in names or () if name not in again]
    rows = [(row, 0.0) for row in (catalog.require(stage, own or None) if own or not names else [])]
    for name, row in again.items():
        if names and name not in names:
            continue
        share = _lost(f"{out}/{catalog.stages[stage].rebuilds}/{name}")
        if names or share >= REBUILD_SHARE:
            rows.append((row, share))
    return rows


def _lost(url: str) -> float:
    """Share of a dataset's samples that have less than its rows hold; 0 for one that is not built."""
    try:
        index: DatasetIndex = parse_index(open_storage(url).read(INDEX_NAME), url)
    except FileNotFoundError:
        return 0.0
    return sum(index.fitted.get(kind, 0) for kind in LOST) / max(1, index.totals.samples)
