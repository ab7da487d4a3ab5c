"""Toy datasets in the shard format: real tars of random samples, or sidecars alone where only lengths matter."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.build.writer import npy_bytes, row_facts, write_shard
from shards.format import FORMAT_VERSION, TOKEN_DTYPE, DatasetIndex, ShardInfo, Totals, index_dtype, key_hash
from shards.layout import VisualLayout, VisualTokens
from shards.media.jpeg import encode_jpeg
from shards.schema import Sample
from shards.stream.dataset import Dataset, open_dataset

LAYOUT = VisualLayout(
    tokens=VisualTokens.after(512), crop_size=48, patch_size=8, overlap_margin=1, image_pool=2, video_pool=3
)
PROCESSOR: dict[str, Any] = {"layout": LAYOUT.to_json(), "tokenizer": "0" * 64, "chat_format": 1}
VARIANTS = 2


def _visuals(kind: str, rng: np.random.Generator) -> tuple[list[dict[str, Any]], tuple[bytes, ...]]:
    """Visuals of a sample and its JPEG members."""
    crop = (LAYOUT.crop_size, LAYOUT.crop_size)
    visuals: list[dict[str, Any]] = []
    sizes: list[tuple[int, int]] = []
    if kind == "video":
        sizes = [crop] * int(rng.integers(1, 5))
        visuals = [{"kind": "frame", "view": i, "time": i / 2} for i in range(len(sizes))]
    elif kind == "image":
        tiling = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        sizes = [crop, LAYOUT.canvas_size(tiling)]
        visuals = [{"kind": "image", "view": 0, "canvas": 1, "tiling": list(tiling)}]
    return visuals, tuple(encode_jpeg(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes)


def _variant(visuals: list[dict[str, Any]], rng: np.random.Generator) -> np.ndarray:
    """BOS and placeholders, then one to three branches of random words, the second half of each with a weight."""
    tokens = LAYOUT.tokens
    trunk = [0] + [tokens.video if visual["kind"] == "frame" else tokens.image for visual in visuals]
    rows = [(token, 0, 0.0) for token in trunk]
    for branch in range(1, int(rng.integers(2, 5))):
        words = rng.integers(2, 500, int(rng.integers(4, 30))).tolist()
        rows += [(word, branch, 0.0 if i < len(words) // 2 else 0.5) for i, word in enumerate(words)]
        rows.append((1, branch, 0.5))
    return np.array(rows, TOKEN_DTYPE)


def make_sample(dataset: str, number: int) -> Sample:
    """Text, image or video in turn; every draw from (dataset, number)."""
    seed = int.from_bytes(hashlib.sha256(f"{dataset} {number}".encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.Philox(seed))
    visuals, images = _visuals(("text", "image", "video")[number % 3], rng)
    key = f"{dataset}-{number:05d}"
    record = {
        "key": key,
        "dataset": dataset,
        "source": {"file": "toy", "row": number},
        "media": {},
        "visuals": visuals,
        "variants": [{"messages": []} for _ in range(VARIANTS)],
    }
    variants = tuple(_variant(visuals, rng) for _ in range(VARIANTS))
    return Sample(key=key, record=record, variants=variants, images=images)


def write_index(folder: Path, shards: Sequence[ShardInfo], num_variants: int, processor: dict[str, Any]) -> None:
    """index.json of a dataset."""
    samples = sum(shard.samples for shard in shards)
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=folder.name,
        stage="sft",
        num_variants=num_variants,
        processor=processor,
        source={},
        build={},
        totals=Totals(samples=samples, annotations=samples, tokens=0, crops=0, frames=0, bytes=0, rejects=0),
        shards=tuple(shards),
    )
    (folder / "index.json").write_text(index.model_dump_json())


def write_samples(
    root: Path, name: str, samples: Sequence[Sample], per_shard: int = 16, processor: dict[str, Any] | None = None
) -> Path:
    """A dataset of the given samples; its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    infos = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        path = folder / f"{number:06d}.tar"
        info, rows = write_shard(path, path.stem, samples[first : first + per_shard], LAYOUT, VARIANTS)
        path.with_suffix(".idx.npy").write_bytes(npy_bytes(rows))
        infos.append(info)
    write_index(folder, infos, VARIANTS, processor or PROCESSOR)
    return folder


def write_dataset(
    root: Path, name: str, num_samples: int, per_shard: int = 16, processor: dict[str, Any] | None = None
) -> Path:
    """A dataset of random samples; its folder."""
    samples = [make_sample(name, number) for number in range(num_samples)]
    return write_samples(root, name, samples, per_shard, processor)


def write_lengths(
    root: Path, name: str, tokens: np.ndarray, crops: np.ndarray, weights: np.ndarray | float = 1.0, num_shards: int = 1
) -> Dataset:
    """A dataset of which only the lengths exist: `tokens` and `crops` int [n, K]."""
    folder = root / name
    folder.mkdir(parents=True)
    rows = np.zeros(len(tokens), index_dtype(tokens.shape[1]))
    rows["num_tokens"], rows["num_crops"] = tokens, crops
    rows["num_pairs"] = tokens * (tokens + 1) / 2  # causal
    rows["loss_weight"] = np.broadcast_to(weights, tokens.shape)
    rows["key_hash"] = [key_hash(f"{name}-{i}") for i in range(len(tokens))]
    rows["offset"] = np.arange(len(tokens)) * 512
    infos = []
    for number, part in enumerate(np.array_split(rows, num_shards)):
        data, stem = npy_bytes(part), f"{number:06d}"
        (folder / f"{stem}.idx.npy").write_bytes(data)
        infos.append(ShardInfo(name=stem, bytes=0, sha256="0" * 64, **row_facts(part, data)))
    write_index(folder, infos, tokens.shape[1], PROCESSOR)
    return open_dataset(str(root), name)
