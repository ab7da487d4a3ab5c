"""What the builder costs beside bare decoding and encoding of the same frames.

    python benchmarks/bench_build.py                     three minutes
    python benchmarks/bench_build.py --videos 2 --images 8

Three sources are made in a temporary folder, moving pictures with a grain as a camera has it: H.264 videos (640 x 360
pixels, 30 frames a second) of 20 seconds, about the median of Molmo2's video sets, and of 10 seconds, and JPEG images
in a parquet file (1024 x 768), with one question each. The builder makes shards of them with Molmo2's geometry, four
text variants and a small tokenizer. "Bare" is a loop over the same files: decode the same frames or the image, resize
as the builder does, encode JPEG with the same library and quality, write nothing; videos with decord, PyAV and, where
it is installed, torchcodec, a thread each. "Unresized" decodes with decord or Pillow and encodes at the source's size.

The main figure is CPU time, of the process and all that it started, since other work shares the cores: start-up is
left out by a round that does not count; of the others, all kinds in turn, the median does. Builder and bare loop both
run in two processes, as a machine that builds is busy on all cores; one worker is there for the scaling, by the clock
(which means little when others use the cores) and by CPU time per sample. The bar is the share of the bare loop's
throughput with the decoder that the builder takes for these files, decord. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import av
import decord
import numpy as np
import PIL.Image
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from bench_plan import cpu_name

from molmo2.demo.image_sets import IMAGE_QA_SCHEMA
from molmo2.demo.video_sets import QA_SCHEMA
from molmo2.processing.contract import JPEG_QUALITY, STAGE_MODES
from molmo2.processing.frames import frame_times
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from molmo2.processing.processor import Processor
from molmo2.processing.tiling import canvas, choose_tiling, view
from molmo2.processing.tokenizer import Tokenizer
from shards.build.builder import build_dataset
from shards.build.pool import WorkerPool, worker_pool
from shards.build.task import ProcessorFactory
from shards.catalog import load_catalog
from shards.layout import VisualLayout, VisualTokens
from shards.media.jpeg import encode_jpeg

BASE_VOCAB = 512
LAYOUT = VisualLayout(
    tokens=VisualTokens.after(BASE_VOCAB), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
DEMO, MOLMO2 = load_catalog("demo"), load_catalog("molmo2")
VIDEO, IMAGE = "demo-video-qa", "demo-image-qa"
RATE, SECONDS = 30, (20, 10)
QUESTION, ANSWER = "Which way does it move, and how fast?", "Slowly to the right, and then out of the picture."


ONE, TWO = "one worker", "two workers"
Bare = Callable[[Path, int], tuple[int, int]]  # a raw folder and which half of it -> samples and frames
Read = Callable[[Path], Iterator[np.ndarray]]  # a video -> the frames that the builder takes of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run: seconds by the clock and of CPU, samples, frames (or images)."""

    wall: float
    cpu: float
    samples: int
    frames: int


# --- sources ---------------------------------------------------------------------------------------------------------


def scenery(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Patches of several sizes, float32 [height, width, 3]."""
    total = np.zeros((height, width, 3), np.float32)
    for size in (8, 32, 128):
        small = rng.integers(0, 256, (height // size + 2, width // size + 2, 3), np.uint8)
        large = PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)
        total += np.asarray(large, np.float32) / 3
    return total


def grained(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """As a camera sees it, uint8."""
    grain = np.roll(rng.normal(0, 4, (picture.shape[0] // 4 + 1, picture.shape[1], 1)).astype(np.float32), 1)
    noise = np.tile(grain, (4, 1, 1))[: picture.shape[0]]
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def write_video(path: Path, number: int, seconds: int, height: int, width: int) -> None:
    """A camera that moves over a scene."""
    rng = np.random.Generator(np.random.Philox(number))
    steps = RATE * seconds
    scene = scenery(rng, height + steps, width + 2 * steps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for step in range(steps):
            frame = grained(rng, scene[step : step + height, 2 * step : 2 * step + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_videos(raw: Path, count: int, seconds: int, height: int, width: int) -> Path:
    """A raw folder in the layout of `demo-video-qa`."""
    (raw / "videos").mkdir(parents=True)
    (raw / "data").mkdir()
    rows = []
    for number in range(count):
        write_video(raw / "videos" / f"{number}.mp4", number, seconds, height, width)
        rows.append(
            {
                "video_id": str(number),
                "Question": QUESTION,
                "Answer": ANSWER,
                "NegativeAnswers": ["It rests."],
                "Category": "motion",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, QA_SCHEMA), raw / "data" / "train-0.parquet")
    return raw


def write_images(raw: Path, count: int) -> Path:
    """A raw folder in the layout of `demo-image-qa`."""
    (raw / "data").mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(0))
    rows = []
    for _ in range(count):
        data = encode_jpeg(grained(rng, scenery(rng, 768, 1024)), 90)
        rows.append({"image": {"bytes": data, "path": None}, "qa_pairs": {"question": [QUESTION], "answer": [ANSWER]}})
    pq.write_table(pa.Table.from_pylist(rows, IMAGE_QA_SCHEMA), raw / "data" / "train-0.parquet")
    return raw


# --- runs ------------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU time of this process and of all that live below it."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


def timed(run: Callable[[], tuple[int, int]]) -> Cost:
    """Cost of `run`, which gives samples and frames. Processes that it starts must live on."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    samples, frames = run()
    return Cost(wall=time.perf_counter() - wall, cpu=cpu_seconds() - cpu, samples=samples, frames=frames)


def make_processor(tokenizer: Path) -> Processor:
    """Molmo2's geometry with a small tokenizer."""
    return Processor(LAYOUT, Tokenizer(tokenizer, BASE_VOCAB), STAGE_MODES["sft"], 4)


def build(name: str, raw: Path, make: ProcessorFactory, pool: WorkerPool | None, per_shard: int) -> tuple[int, int]:
    """One build from nothing, into a folder beside `raw`; samples and frames."""
    (row,) = DEMO.select("sft", [name])
    settings = MOLMO2.stages["sft"].model_copy(update={"examples_per_shard": per_shard})
    out = Path(tempfile.mkdtemp(prefix="out-", dir=raw.parent))
    index = build_dataset(row, "sft", settings, make, raw=raw, out=out, pool=pool).index
    assert index is not None
    assert index.totals.rejects == 0, f"{name}: {index.totals.rejects} rejects"
    return index.totals.samples, index.totals.frames or index.totals.samples


def bare_decord(raw: Path, half: int) -> tuple[int, int]:
    """decord alone, frames by number, of every other video."""
    return _bare_videos(raw, half, decord_frames)


def unresized_decord(raw: Path, half: int) -> tuple[int, int]:
    """The same without the resize."""
    return _bare_videos(raw, half, decord_frames, resized=False)


def bare_pyav(raw: Path, half: int) -> tuple[int, int]:
    """PyAV alone, from start to end, of every other video."""
    return _bare_videos(raw, half, pyav_frames)


def bare_torchcodec(raw: Path, half: int) -> tuple[int, int]:
    """torchcodec alone, frames by number, of every other video."""
    return _bare_videos(raw, half, torchcodec_frames)


def _bare_videos(raw: Path, half: int, read: Read, resized: bool = True) -> tuple[int, int]:
    frames = 0
    paths = sorted((raw / "videos").iterdir())[half::2]
    for path in paths:
        for frame in read(path):
            encode_jpeg(view(LAYOUT, frame) if resized else frame, JPEG_QUALITY)
            frames += 1
    return len(paths), frames


def frame_numbers(count: int) -> np.ndarray:
    """The frames that Molmo2's rule takes of a video of `count` frames."""
    return np.minimum((np.array(frame_times(count / RATE, 2.0, 128)) * RATE).astype(int), count - 1)


def decord_frames(path: Path) -> Iterator[np.ndarray]:
    reader = decord.VideoReader(str(path), num_threads=1)
    yield from reader.get_batch(frame_numbers(len(reader))).asnumpy()


def torchcodec_frames(path: Path) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    yield from decoder.get_frames_at(frame_numbers(len(decoder)).tolist()).data.numpy()


def pyav_frames(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(frame_numbers(stream.frames).tolist())
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield frame.to_ndarray(format="rgb24")


def bare_images(raw: Path, half: int) -> tuple[int, int]:
    """The view and the canvas of every other image."""
    limits = MOLMO2.stages["sft"].limits
    images = _decoded(raw, half)
    for pixels in images:
        tiling = choose_tiling(LAYOUT, *pixels.shape[:2], limits.image_crops)
        for made in (view(LAYOUT, pixels), canvas(LAYOUT, pixels, tiling)):
            encode_jpeg(made, JPEG_QUALITY)
    return len(images), len(images)


def unresized_images(raw: Path, half: int) -> tuple[int, int]:
    """Every other image, decoded and encoded once at its own size."""
    images = _decoded(raw, half)
    for pixels in images:
        encode_jpeg(pixels, JPEG_QUALITY)
    return len(images), len(images)


def _decoded(raw: Path, half: int) -> list[np.ndarray]:
    rows = pq.read_table(raw / "data" / "train-0.parquet").column("image").to_pylist()[half::2]
    return [np.asarray(PIL.Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]


def in_both(pool: WorkerPool, bare: Bare, raw: Path) -> tuple[int, int]:
    """A half in each worker."""
    halves = [future.result() for future in [pool.executor.submit(bare, raw, half) for half in (0, 1)]]
    return sum(samples for samples, _ in halves), sum(frames for _, frames in halves)


def measure(name: str, raw: Path, bares: list[Bare], make: ProcessorFactory, rounds: int) -> dict[str, list[Cost]]:
    """The runs of each kind, a round after the other."""
    per_shard = pq.read_metadata(raw / "data" / "train-0.parquet").num_rows // 2
    costs: dict[str, list[Cost]] = {}
    with worker_pool(make, 2) as pool:
        assert pool is not None
        runs = {bare.__name__: partial(in_both, pool, bare, raw) for bare in bares}
        runs[TWO] = partial(build, name, raw, make, pool, per_shard)
        runs[ONE] = partial(build, name, raw, make, None, per_shard)
        for number in range(rounds + 1):
            for label, run in runs.items():
                cost = timed(run)
                for out in raw.parent.glob("out-*"):
                    shutil.rmtree(out)
                if number:  # the first warms up: imports, decoding processes, the page cache
                    costs.setdefault(label, []).append(cost)
    return costs


def typical(costs: list[Cost]) -> Cost:
    """Median times of equal runs."""
    return replace(costs[0], wall=median(cost.wall for cost in costs), cpu=median(cost.cpu for cost in costs))


def ratio(over: list[Cost], under: list[Cost], time: Literal["cpu", "wall"] = "cpu") -> float:
    """Median over the rounds: what slows one run of a round mostly slows its neighbours too."""
    return round(median(getattr(a, time) / getattr(b, time) for a, b in zip(over, under, strict=True)), 3)


def summary(costs: dict[str, list[Cost]]) -> dict[str, float]:
    """Per second of CPU with both cores busy, the builder's share of each bare run, and scaling."""
    one, two = costs[ONE], costs[TWO]
    ours = typical(two)
    return {
        "samples_per_core_second": round(ours.samples / ours.cpu, 2),
        "frames_per_core_second": round(ours.frames / ours.cpu, 1),
        "scaling_wall": ratio(one, two, "wall"),
        "scaling_cpu": ratio(one, two),
    } | {f"of_{label}": ratio(found, two) for label, found in costs.items() if label not in {ONE, TWO}}


def main() -> None:
    """Make the sources, measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4, help="after the one that warms up (%(default)s)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bench-build-"))
    try:
        train_demo_tokenizer([QUESTION, ANSWER], root / "tokenizer", BASE_VOCAB)
        make = partial(make_processor, root / "tokenizer")
        bares: list[Bare] = [bare_decord, unresized_decord, bare_pyav]
        bares += [bare_torchcodec] if importlib.util.find_spec("torchcodec") else []
        results = {}
        for seconds in SECONDS:
            count = arguments.videos * SECONDS[0] // seconds  # as much footage in each: a dataset has costs of its own
            videos = write_videos(root / f"raw-{seconds}" / "raw", count, seconds, 360, 640)
            results[f"video_{seconds}s"] = measure(VIDEO, videos, bares, make, arguments.rounds)
        pictures = write_images(root / "raw-images" / "raw", arguments.images)
        results["image"] = measure(IMAGE, pictures, [bare_images, unresized_images], make, arguments.rounds)
    finally:
        shutil.rmtree(root)
    print(f"{'source':12s}{'run':18s}{'CPU ms a frame':>16s}{'CPU ms a sample':>17s}{'seconds':>9s}")
    for source, costs in results.items():
        for label, found in costs.items():
            cost = typical(found)
            print(
                f"{source:12s}{label:18s}{cost.cpu / cost.frames * 1e3:16.2f}{cost.cpu / cost.samples * 1e3:17.1f}"
                f"{cost.wall:9.2f}"
            )
    figures = {source: summary(costs) for source, costs in results.items()}
    shares = {f"{source}_of_bare_decord": of["of_bare_decord"] for source, of in figures.items() if source != "image"}
    bars = {name: {"value": share, "bar": 0.9, "ok": share >= 0.9} for name, share in shares.items()}
    print(json.dumps({"bench": "build", "hardware": cpu_name(), "figures": figures, "bars": bars}))


if __name__ == "__main__":
    main()
