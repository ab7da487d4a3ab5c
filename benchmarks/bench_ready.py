"""Ready packs a CPU-second beside an on-the-fly pipeline: the same pictures and texts, the same packs' layout.

    python benchmarks/bench_ready.py                    about five minutes
    python benchmarks/bench_ready.py --seconds 5

    ours           shards that were built before: `make_loader` reads, verifies, decodes and collates
    on the fly     webdataset reads raw JPEGs and texts; the same processor tokenizes, resizes exactly and tiles, but
                   keeps pixels; a pool of 48 samples is packed by an exact knapsack; the same function collates
    ... by cv2     the same with OpenCV's bilinear resize, which is faster and gives other pixels

Packs have 4,096 tokens and at most 128 crops. Both are read by one worker process; the CPU time of the worker and of
the main process counts, after a few packs. Pictures are views of photographs (scikit-learn, scikit-image) of about
860 x 860 pixels, texts are English (Python's own help), ids are Qwen3's. Not here: videos, whose decoding would make an
on-the-fly pipeline slower still, and reading over a network. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import tokenizers
import torch
import webdataset as wds
from bench_plan import Setting, best_subset, cpu_name
from loader_peers import cpu_seconds
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, IterableDataset

from molmo2.model.presets import PRESETS
from molmo2.processing import visuals
from molmo2.processing.new_tokenizer import write_tokenizer
from molmo2.processing.processor import ProcessorSettings, build_processor
from shards.build.writer import npy_bytes, write_shard
from shards.format import FORMAT_VERSION, DatasetIndex, ShardInfo, Totals
from shards.layout import split_crops, visual_crops
from shards.schema import Chat, Example, ImageRef, Limits, Sample, Source, Turn
from shards.stream.collate import Batch, collate, make_pixels, open_sample
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, PackSpec, PlanSettings, open_plan
from shards.stream.reader import StoredSample

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from qwen3 import qwen3_directory  # noqa: E402

PACK = Setting(tokens=4096, crops=128, frames=128)
LIMITS = Limits(sequence_length=4096, max_crops=128)
KINDS = {"text": 0.0, "image": 1.0, "mix": 0.5}  # part of the samples that have a picture
POOL, WARM = 48, 8


def rows(kind: str, count: int) -> Iterator[tuple[bytes | None, str, str]]:
    """Picture or None, question and answer: about 300 words, or 80 beside a picture."""
    rng = np.random.Generator(np.random.Philox(7))
    words = " ".join(pydoc_data.topics.topics.values()).split()
    photos = [Image.fromarray(p) for p in (*load_sample_images().images, photographs.astronaut(), photographs.coffee())]
    for _ in range(count):
        picture = None
        if rng.random() < KINDS[kind]:
            photo = photos[rng.integers(len(photos))]
            width, height = rng.integers(240, 400, 2).tolist()
            left, top = rng.integers(photo.width - width + 1), rng.integers(photo.height - height + 1)
            part = photo.crop((left, top, left + width, top + height)).resize((int(2.7 * width), int(2.7 * height)))
            buffer = io.BytesIO()
            part.save(buffer, "JPEG", quality=90)
            picture = buffer.getvalue()
        start, size = rng.integers(len(words) - 400), 80 if picture else 300
        yield picture, " ".join(words[start : start + 12]), " ".join(words[start + 12 : start + 12 + size])


def example(number: int, picture: bytes | None, question: str, answer: str) -> Example:
    """A row as the builder and the on-the-fly pipeline get it."""
    chat = Chat(style="user_qa", turns=(Turn(role="user", text=question), Turn(role="assistant", text=answer)))
    images = () if picture is None else (ImageRef(data=picture),)
    return Example(
        key=f"r-{number:06d}", dataset="r", source=Source(file="r", row=number), annotations=(chat,), images=images
    )


# --- ours ------------------------------------------------------------------------------------------------------------


def build(folder: Path, kind: str, count: int, processor: Any) -> None:
    """Shards of the rows, by the processor and the writer of every build."""
    infos: list[ShardInfo] = []
    samples: list[Sample] = []
    folder.mkdir(parents=True)
    for number, row in enumerate(rows(kind, count)):
        samples.append(processor(example(number, *row), LIMITS))
        if len(samples) == 256 or number == count - 1:
            name = f"{len(infos):06d}"
            info, index_rows = write_shard(folder / f"{name}.tar", name, samples, processor.layout, 4)
            (folder / f"{name}.idx.npy").write_bytes(npy_bytes(index_rows))
            infos.append(info)
            samples = []
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset=folder.name,
        stage="sft",
        num_variants=4,
        processor=processor.settings,
        source={},
        build={},
        totals=Totals(**dict.fromkeys(Totals.model_fields, 0) | {"samples": count}),
        shards=tuple(infos),
    )
    (folder / "index.json").write_text(index.model_dump_json())


def ours(root: Path, kind: str) -> Iterator[Batch]:
    """Packs of the loader, by one worker."""
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {kind: None}}}})
    settings = PlanSettings(sequence_length=PACK.tokens, max_crops=PACK.crops, packs_per_step=1, window=1024)
    layout = build_processor_of(root).layout
    return make_loader(open_plan([str(root / "shards")], mixture, settings), Cursor(), layout, workers=1, prefetch=4)


# --- on the fly ------------------------------------------------------------------------------------------------------


def write_raw(path: Path, kind: str, count: int) -> None:
    """The rows as a plain webdataset tar."""
    with wds.TarWriter(str(path)) as sink:
        for number, (picture, question, answer) in enumerate(rows(kind, count)):
            texts = {"__key__": f"r-{number:06d}", "json": {"question": question, "answer": answer}}
            sink.write(texts if picture is None else texts | {"jpg": picture})


class OnTheFly(IterableDataset[Batch]):
    """Packs made from raw rows: read, tokenize, resize, tile, pack from a pool, collate."""

    def __init__(self, root: Path, kind: str, opencv: bool) -> None:
        self.root, self.tar, self.opencv = root, str(root / f"{kind}.tar"), opencv

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        processor = build_processor_of(self.root, num_variants=1)
        changes = [mock.patch.object(visuals, "encode_jpeg", lambda pixels, quality: pixels)]
        if self.opencv:
            changes.append(mock.patch.object(visuals.images, "resize", resize_by_opencv))
        for change in changes:
            change.start()
        pool: list[Sample] = []
        stream = self._samples(processor)
        while True:
            while len(pool) < POOL:
                pool.append(next(stream))
            lengths = [(length(processor, sample), crops(sample)) for sample in pool]
            chosen = best_subset(lengths, PACK, PACK.tokens // 512)
            yield pack(processor, [pool[i] for i in chosen])
            pool = [sample for i, sample in enumerate(pool) if i not in set(chosen)]

    def _samples(self, processor: Any) -> Iterator[Sample]:
        number = 0
        while True:
            for row in wds.WebDataset(self.tar, shardshuffle=False).decode(only=["json"]):
                number += 1
                texts = row["json"]
                yield processor(example(number, row.get("jpg"), texts["question"], texts["answer"]), LIMITS)


def resize_by_opencv(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's resize in place of the exact one."""
    return cv2.resize(rgb, size[::-1], interpolation=cv2.INTER_LINEAR)


def crops(sample: Sample) -> int:
    """Crops of a sample."""
    return sum(map(visual_crops, sample.record["visuals"]))


def length(processor: Any, sample: Sample) -> int:
    """Tokens of a sample after its placeholders are expanded and the last token is only a label."""
    from shards.layout import visual_tokens

    pieces = [len(visual_tokens(processor.layout, visual)) for visual in sample.record["visuals"]]
    return len(sample.variants[0]) - 1 - len(pieces) + sum(pieces)


def pack(processor: Any, samples: list[Sample]) -> Batch:
    """The batch of one pack."""
    layout, opened, pixels = processor.layout, [], make_pixels(processor.layout, sum(map(crops, samples)))
    draws, start = [], 0
    for row, sample in enumerate(samples):
        listed, count = sample.record["visuals"], crops(sample)
        weight = float(sample.variants[0]["weight"].sum())
        draws.append(Draw(0, 0, row, 0, 0, 0, 0, length(processor, sample), count, weight))
        stored = StoredSample(key=sample.key, tokens=sample.variants[0], visuals=listed, images={})
        opened.append(open_sample(layout, draws[-1], stored))
        for visual in listed:
            tiling, files = tuple(visual["tiling"]), sample.images
            split_crops(layout, tiling, files[visual["view"]], files[visual["canvas"]], pixels[start : start + count])
        start += count
    return collate(layout, [PackSpec(0, 0, tuple(draws))], opened, pixels, PACK.tokens, 1.0, Cursor())


# --- measuring -------------------------------------------------------------------------------------------------------


def build_processor_of(root: Path, num_variants: int = 4) -> Any:
    """The processor of 4b, with Qwen3's tokenizer."""
    settings = ProcessorSettings(
        preset="4b", tokenizer_dir=str(root / "tokenizer"), stage="sft", num_variants=num_variants
    )
    return build_processor(settings)


def shard_bytes(folder: Path) -> int:
    """Size of a dataset's shards with their sidecars."""
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(batches: Iterator[Batch], seconds: float) -> dict[str, float]:
    """Packs, and tokens of samples, a CPU-second."""
    for _ in range(WARM):
        next(batches)
    since, before, packs, tokens = time.monotonic(), cpu_seconds(), 0, 0
    while packs < 4 or time.monotonic() - since < seconds:
        batch = next(batches)
        packs, tokens = packs + 1, tokens + int((batch.segment_ids != 2**31 - 1).sum())
    spent = cpu_seconds() - before
    return {"packs": packs / spent, "tokens": tokens / spent}


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=768, help="rows of each kind")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result: dict[str, Any] = {"bench": "ready", "hardware": cpu_name(), "figures": {}}
    with tempfile.TemporaryDirectory(prefix="bench-ready-") as folder:
        root = Path(folder)
        tokenizer = tokenizers.Tokenizer.from_file(str(qwen3_directory() / "tokenizer.json"))
        write_tokenizer(tokenizer, root / "tokenizer", PRESETS["4b"].text.vocab_size)
        print(f"{'kind':<6} {'pipeline':<18} {'packs':>8} {'tokens':>10}  a CPU-second, worker included")
        for kind in KINDS:
            build(root / "shards" / kind, kind, args.samples, build_processor_of(root))
            write_raw(root / f"{kind}.tar", kind, args.samples)
            fly = functools.partial(DataLoader, batch_size=None, num_workers=1, prefetch_factor=4)
            stored, raw = shard_bytes(root / "shards" / kind), (root / f"{kind}.tar").stat().st_size
            result["figures"][f"{kind}, shards / raw tar, bytes"] = float(f"{stored / raw:.3g}")
            pipelines = {"ours": ours(root, kind)}
            pipelines["on the fly"] = iter(fly(OnTheFly(root, kind, opencv=False)))
            if KINDS[kind]:
                pipelines["on the fly by cv2"] = iter(fly(OnTheFly(root, kind, opencv=True)))
            for name in list(pipelines):
                found = measure(pipelines[name], args.seconds)
                result["figures"][f"{kind}, {name}"] = {key: float(f"{v:.4g}") for key, v in found.items()}
                print(f"{kind:<6} {name:<18} {found['packs']:>8.1f} {found['tokens']:>10,.0f}", flush=True)
                del pipelines[name]
            print(f"{kind:<6} shards take {stored / raw:.2f} times the bytes of the raw rows", flush=True)
    figures = result["figures"]
    for kind, goal in (("text", 8.0), ("image", 3.0), ("mix", 10.0)):
        ratio = figures[f"{kind}, ours"]["tokens"] / figures[f"{kind}, on the fly"]["tokens"]
        result.setdefault("bars", {})[f"{kind}, times an on-the-fly pipeline"] = bar(ratio, goal)
    ratio = figures["image, ours"]["tokens"] / figures["image, on the fly by cv2"]["tokens"]
    result["bars"]["image, times that by cv2"] = bar(ratio, 1.5)
    print(json.dumps(result))


def bar(value: float, goal: float) -> dict[str, Any]:
    """A figure beside its goal."""
    return {"value": float(f"{value:.3g}"), "bar": goal, "ok": value >= goal}


if __name__ == "__main__":
    main()
