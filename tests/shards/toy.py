"""Toy datasets in the shard format: real tars of random samples, or sidecars alone where only lengths matter."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from shards.dataset import Dataset, open_dataset
from shards.format import FORMAT_VERSION, TOKEN_DTYPE, DatasetIndex, ShardInfo, Totals, index_dtype, key_hash, span_hash
from shards.layout import VisualLayout, VisualTokens, expand, sample_visuals, visual_crops
from shards.media import encode_jpeg

LAYOUT = VisualLayout(
    tokens=VisualTokens.after(512), crop_size=48, patch_size=8, overlap_margin=1, image_pool=2, video_pool=3
)
PROCESSOR: dict[str, Any] = {"layout": LAYOUT.to_json(), "tokenizer": "0" * 64, "chat_format": 1}
VARIANTS = 2


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _visuals(kind: str, rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Visuals of a sample and its JPEG members."""
    if kind == "video":
        sizes = [(LAYOUT.crop_size, LAYOUT.crop_size)] * int(rng.integers(1, 5))
        visuals = [{"kind": "frame", "view": i, "time": i / 2} for i in range(len(sizes))]
    elif kind == "image":
        tiling = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        sizes = [(LAYOUT.crop_size, LAYOUT.crop_size), LAYOUT.canvas_size(tiling)]
        visuals = [{"kind": "image", "view": 0, "canvas": 1, "tiling": list(tiling)}]
    else:
        sizes, visuals = [], []
    return visuals, [encode_jpeg(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def _variant(visuals: list[dict[str, Any]], rng: np.random.Generator) -> np.ndarray:
    """BOS and placeholders, then one to three branches of random words, the second half of each with a weight."""
    tokens = LAYOUT.tokens
    trunk = [0] + [tokens.video if v["kind"] == "frame" else tokens.image for v in visuals]
    rows = [(token, 0, 0.0) for token in trunk]
    for branch in range(1, int(rng.integers(2, 5))):
        words = rng.integers(2, 500, int(rng.integers(4, 30))).tolist()
        half = len(words) // 2
        rows += [(word, branch, 0.0 if i < half else 0.5) for i, word in enumerate(words)] + [(1, branch, 0.5)]
    return np.array(rows, TOKEN_DTYPE)


def make_sample(dataset: str, number: int) -> dict[str, Any]:
    """Members of one sample: text, image or video in turn; every draw from (dataset, number)."""
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
    variants = {f"tokens{k}.npy": npy(_variant(visuals, rng)) for k in range(VARIANTS)}
    jpegs = {f"{i:03d}.jpg": data for i, data in enumerate(images)}
    return {"__key__": key, "json": json.dumps(record).encode(), **variants, **jpegs}


def index_row(sample: dict[str, Any], offset: int, span: bytes) -> tuple[Any, ...]:
    record = json.loads(sample["json"])
    crops, tokens, weights = [], [], []
    for k in range(VARIANTS):
        stored = np.load(io.BytesIO(sample[f"tokens{k}.npy"]))
        visuals = sample_visuals(record, k)
        crops.append(sum(visual_crops(visual) for visual in visuals))
        tokens.append(len(expand(LAYOUT, stored, visuals).input_ids))
        weights.append(stored["weight"].sum())
    frames = sum(visual["kind"] == "frame" for visual in record["visuals"])
    return offset, span_hash(span), len(span), key_hash(sample["__key__"]), frames, crops, tokens, weights


def write_tar(path: Path, samples: Sequence[dict[str, Any]]) -> np.ndarray:
    """Write samples to a tar; its sidecar's rows."""
    edges = [0]
    with open(path, "wb") as file:
        writer = wds.TarWriter(file, mtime=0)
        for sample in samples:
            writer.write(sample)
            edges.append(writer.tarstream.offset)
        writer.close()
    data = path.read_bytes()
    pairs = zip(edges[:-1], edges[1:], strict=True)
    rows = [index_row(sample, start, data[start:end]) for sample, (start, end) in zip(samples, pairs, strict=True)]
    return np.array(rows, index_dtype(VARIANTS))


def write_index(folder: Path, sidecars: Sequence[np.ndarray], processor: dict[str, Any]) -> None:
    """Write sidecars and index.json; tars are described as they lie there, if they do."""
    shards = []
    for number, rows in enumerate(sidecars):
        name = f"{number:06d}"
        data, tar = npy(rows), folder / f"{name}.tar"
        (folder / f"{name}.idx.npy").write_bytes(data)
        content = tar.read_bytes() if tar.exists() else b""
        shards.append(
            ShardInfo(
                name=name,
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                samples=len(rows),
                index_sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    total = sum(len(rows) for rows in sidecars)
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=folder.name,
        stage="sft",
        num_variants=sidecars[0]["num_tokens"].shape[1],
        processor=processor,
        source={},
        build={},
        totals=Totals(samples=total, annotations=total, tokens=0, crops=0, frames=0, bytes=0, rejects=0),
        shards=tuple(shards),
    )
    (folder / "index.json").write_text(index.model_dump_json())


def write_dataset(
    root: Path, name: str, num_samples: int, per_shard: int = 16, processor: dict[str, Any] | None = None
) -> Path:
    """A dataset of real samples; its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    numbers = range(0, num_samples, per_shard)
    sidecars = [
        write_tar(
            folder / f"{shard:06d}.tar",
            [make_sample(name, i) for i in range(first, min(first + per_shard, num_samples))],
        )
        for shard, first in enumerate(numbers)
    ]
    write_index(folder, sidecars, processor or PROCESSOR)
    return folder


def write_lengths(
    root: Path, name: str, tokens: np.ndarray, crops: np.ndarray, weights: np.ndarray | float = 1.0, num_shards: int = 1
) -> Dataset:
    """A dataset of which only the lengths exist: `tokens` and `crops` int [n, K]."""
    folder = root / name
    folder.mkdir(parents=True)
    rows = np.zeros(len(tokens), index_dtype(tokens.shape[1]))
    rows["num_tokens"], rows["num_crops"], rows["loss_weight"] = tokens, crops, weights
    rows["key_hash"] = [key_hash(f"{name}-{i}") for i in range(len(tokens))]
    write_index(folder, np.array_split(rows, num_shards), PROCESSOR)
    return open_dataset(str(root), name)
