"""Our loader beside webdataset, MosaicML Streaming (MDS), LitData and Megatron-Energon, on the same samples.

    python benchmarks/bench_loader.py                     a few minutes, after the peers are installed
    python benchmarks/bench_loader.py --samples 512 --seconds 2

Samples are text alone (300 tokens), and text with four JPEG frames of 378 x 378 pixels. They are written once to a
temporary folder: as our shards, which webdataset and Energon read as they are, and converted to MDS and to LitData's
chunks. Every figure is of a process of its own without workers, on a warm page cache. Peers read in the order of the
files (Energon of files in random order), their cheapest; ours reads in the plan's order and verifies every checksum.
A batch, and a step, is 8 samples; of ours a pack of up to 5,120 tokens, which is 8 samples with frames and 16 of text.

    bytes        tokens and frames in memory, frames as JPEG: ours parses the tokens, the peers give bytes
    decoded      frames as uint8 pixels, tokens as arrays; ours also expands tokens to inputs and labels
    first batch  from opening the dataset, libraries imported, at a step of a run; peers as far as their API can
    memory       peak of the process while it decodes, libraries included
    read         bytes asked from the system per sample, the page cache's included, memory maps not

The peers are installed once, into an environment that sees no package of this one, in the user's cache folder; a peer
that cannot be installed or run is absent, with the reason. Then all of it from a real S3 server that answers 50 ms
late, by the clock (`loader_far.py`). Not here: shuffling. The last line is one JSON object; what was not measured is
not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loader_far
import numpy as np
from bench_plan import cpu_name
from loader_peers import FAR, READERS, AbsentError, Stream, report

from shards.build.writer import npy_bytes, write_shard
from shards.format import FORMAT_VERSION, TOKEN_DTYPE, DatasetIndex, Totals
from shards.layout import VisualLayout, VisualTokens
from shards.media.jpeg import encode_jpeg
from shards.schema import Sample
from shards.stream.collate import decode_crops, make_pixels, open_sample
from shards.stream.loader import make_loader
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, Draw, Plan, PlanSettings, open_plan
from shards.stream.reader import Damage, StoredSample, read_sample

LAYOUT = VisualLayout(
    tokens=VisualTokens.after(100_000), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
PACKAGES = {
    "webdataset": ("webdataset", "pillow"),
    "mds": ("mosaicml-streaming",),
    "litdata": ("litdata", "xxhash"),
    "energon": ("megatron-energon",),
}
STEPS = (10, 10_000, 1_000_000)
WORDS = 300
PER_SHARD = 256
LIMIT = 600.0  # seconds of one measurement
FRAMES = {"text": 0, "frames": 4}
PICTURES = 64  # different ones; samples draw from them
HERE = Path(__file__).resolve().parent


# --- samples ---------------------------------------------------------------------------------------------------------


def pictures(rng: np.random.Generator) -> list[bytes]:
    """JPEGs of smooth colours with some noise, about as large as frames of real videos."""
    made = []
    for _ in range(PICTURES):
        coarse = rng.integers(0, 256, (27, 27, 3)).astype(np.float32)
        smooth = np.kron(coarse, np.ones((14, 14, 1), np.float32))
        for axis in (0, 1):
            smooth = np.mean([np.roll(smooth, shift, axis) for shift in range(-7, 8)], axis=0)
        noisy = smooth + rng.normal(0, 1, smooth.shape)
        made.append(encode_jpeg(noisy.clip(0, 255).astype(np.uint8)))
    return made


def samples(count: int, num_frames: int) -> Iterator[Sample]:
    """Text and frames; every sample has tokens of its own."""
    rng = np.random.Generator(np.random.Philox(5))
    images = pictures(rng)
    visuals = [{"kind": "frame", "view": i, "time": i / 2} for i in range(num_frames)]
    for number in range(count):
        tokens = np.zeros(1 + num_frames + WORDS, TOKEN_DTYPE)
        tokens["id"] = [0, *[LAYOUT.tokens.video] * num_frames, *rng.integers(10, 90_000, WORDS)]
        tokens["branch"][1 + num_frames :], tokens["weight"][-WORDS // 2 :] = 1, 1.0
        key = f"bench-{number:06d}"
        record = {"key": key, "dataset": "bench", "visuals": visuals, "variants": [{"messages": []}]}
        frames = tuple(images[i] for i in rng.integers(0, PICTURES, num_frames))
        yield Sample(key=key, record=record, variants=(tokens,), images=frames)


def write_samples(folder: Path, count: int, num_frames: int) -> None:
    """The shards, an index and no more."""
    made, infos = samples(count, num_frames), []
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, count, PER_SHARD)):
        name = f"{number:06d}"
        part = [next(made) for _ in range(min(PER_SHARD, count - first))]
        info, rows = write_shard(folder / f"{name}.tar", name, part, LAYOUT, 1)
        (folder / f"{name}.idx.npy").write_bytes(npy_bytes(rows))
        infos.append(info)
    zeros = dict.fromkeys(Totals.model_fields, 0)
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset="bench",
        stage="sft",
        num_variants=1,
        processor={"layout": LAYOUT.to_json()},
        source={},
        build={},
        totals=Totals(**zeros),
        shards=tuple(infos),
    )
    (folder / "index.json").write_text(index.model_dump_json())


# --- ours ------------------------------------------------------------------------------------------------------------


def open_ours(folder: Path) -> Plan:
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"bench": None}}}})
    settings = PlanSettings(sequence_length=5120, max_crops=64, packs_per_step=1, window=1024)
    return open_plan([str(folder / "ours")], mixture, settings)


def cursor_at(plan: Plan, step: int) -> Cursor:
    """About where a run would be after `step` steps."""
    draws = sum(len(pack.draws) for pack in plan.step(Cursor()).packs)
    return Cursor(step, step * draws // plan.settings.window, 0)


def ours(folder: Path, decode: bool, step: int) -> Stream:
    """Samples one by one, as the workers read them."""
    plan = open_ours(folder)
    cursor, (tars,) = cursor_at(plan, step), [dataset.tars for dataset in plan.datasets]
    while True:
        spec = plan.step(cursor)
        for draw in (draw for pack in spec.packs for draw in pack.draws):
            found = read_sample(tars, draw)
            assert not isinstance(found, Damage), found
            yield decoded(draw, found) if decode else found
        cursor = spec.cursor


def decoded(draw: Draw, stored: StoredSample) -> Any:
    """Expanded tokens and pixels of a sample."""
    pixels = make_pixels(LAYOUT, draw.num_crops)
    decode_crops(LAYOUT, stored, range(len(stored.visuals)), pixels)
    return open_sample(LAYOUT, draw, stored), pixels


def ours_batches(folder: Path, decode: bool, step: int) -> Stream:
    """The same as packed tensors, from `make_loader` without workers; one item per sample."""
    if not decode:
        raise AbsentError("batches are made of decoded samples")
    plan = open_ours(folder)
    loader = make_loader(plan, cursor_at(plan, step), LAYOUT)
    at = cursor_at(plan, step)
    while True:
        spec = plan.step(at)
        yield from [next(loader)] * sum(len(pack.draws) for pack in spec.packs)
        at = spec.cursor


OURS = {"ours": ours, "ours, packed": ours_batches}


# --- the peers' environment ------------------------------------------------------------------------------------------


def environment() -> tuple[Path, dict[str, str]]:
    """The peers' Python, and why a peer is absent; made on first use, found again by what was asked for."""
    wanted = hashlib.sha256(json.dumps([PACKAGES, sys.version]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nanomolmo2", f"bench-loader-{wanted}")
    python, log = cache / "bin" / "python", cache / "absent.json"
    if log.exists():
        return python, json.loads(log.read_text())
    venv.create(cache, with_pip=True, system_site_packages=False, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--progress-bar", "off"]
    absent = {}
    for name, packages in PACKAGES.items():
        print(f"installing {', '.join(packages)} into {cache}", flush=True)
        done = subprocess.run(
            [*pip, "torch", "torchvision", *packages], capture_output=True, text=True, env=clean_environment()
        )
        if done.returncode:
            absent[name] = f"not installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    log.write_text(json.dumps(absent))
    return python, absent


def clean_environment() -> dict[str, str]:
    """This environment without a way to this project's packages; one thread each."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def started(command: list[str], env: dict[str, str], limit: float) -> dict[str, Any]:
    """The JSON of a process's last line, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"absent": f"not done in {limit:.0f} s"}
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if len(line.strip()) > 10] or [f"exit code {done.returncode}"]
        return {"absent": told[-1][:200]}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # preparing may print other things
    return dict(json.loads(lines[-1])) if lines else {}


# --- the run ---------------------------------------------------------------------------------------------------------


def case(python: Path, name: str, folder: Path, *flags: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    if name in OURS:
        command = [sys.executable, __file__, "--ours", name, "--folder", str(folder)]
        return started([*command, *flags], dict(os.environ), LIMIT)
    command = [str(python), str(HERE / "loader_peers.py"), "run", name, str(folder)]
    return started([*command, *flags], clean_environment(), LIMIT)


def measure_all(python: Path, name: str, folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """All figures of one loader, by the name of the measurement."""
    run = ["--seconds", str(seconds)]
    found = {
        "bytes": case(python, name, folder, *run),
        "decoded": case(python, name, folder, "--decode", *run),
    }
    way = ["--decode"] if name == "ours, packed" else []
    return found | {f"resume at {step:,}": case(python, name, folder, *way, "--step", str(step)) for step in STEPS}


def measure_far(python: Path, folder: Path, peers: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Samples per second by the clock and the time to the first batch, decoded, from a bucket 50 ms away."""
    run, found = ["--seconds", str(seconds)], {}
    with loader_far.far_bucket(folder) as variables:
        for name in loader_far.OURS:
            command = [sys.executable, __file__, "--far", name, *run]
            own = {"XDG_CACHE_HOME": str(folder / "cache" / name)}  # none finds what another one has kept
            found[name] = started(command, dict(os.environ) | variables | own, LIMIT)
        for name in (name for name in peers if name in FAR):
            command = [str(python), str(HERE / "loader_peers.py"), "run", name, str(folder), "--far", *run]
            found[name] = started(command, clean_environment() | variables, LIMIT)
    return found


def far_table(found: dict[str, dict[str, Any]]) -> None:
    """Print what `measure_far` found."""
    print(f"{'from a bucket':22s}{'samples/s':>11s}{'per CPU-second':>16s}{'first batch s':>15s}")
    for name, each in found.items():
        columns = (("per_second", ",.1f", 11), ("per_cpu_second", ",.1f", 16), ("first_batch", ".3f", 15))
        print(f"{name:22s}" + "".join(f"{number(each, field, form):>{width}s}" for field, form, width in columns))
        if "absent" in each:
            print(f"absent: {name}: {each['absent']}")


def number(found: dict[str, Any], field: str, form: str, scale: float = 1.0) -> str:
    return format(found[field] / scale, form) if field in found else "absent"


def table(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print everything side by side, and then why something is absent."""
    print(f"{'':14s}{'samples per CPU-second':>24s}  {'seconds to the first batch':^50s}{'memory':>8s}{'read':>11s}")
    columns = "".join(f"{f'step {step:,}':>15s}" for step in STEPS)
    print(f"{'':14s}{'bytes':>12s}{'decoded':>12s}{'step 0':>9s}{columns}{'MiB':>8s}{'kB/sample':>11s}")
    for name, found in results.items():
        raw, decoded = found["bytes"], found["decoded"]
        start = decoded if "absent" in raw else raw
        print(
            f"{name:14s}{number(raw, 'per_cpu_second', ',.0f'):>12s}{number(decoded, 'per_cpu_second', ',.1f'):>12s}"
            f"{number(start, 'first_batch', '.3f'):>9s}"
            + "".join(f"{number(found[f'resume at {step:,}'], 'first_batch', '.3f'):>15s}" for step in STEPS)
            + f"{number(decoded, 'peak_bytes', '.0f', 2**20):>8s}"
            + f"{number(decoded, 'bytes_per_sample', '.1f', 1e3):>11s}"
        )
    for name, found in results.items():
        for what, each in found.items():
            if "absent" in each:
                print(f"absent: {name}, {what}: {each['absent']}")


def bars(kind: str, results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Our bars, as far as both sides of each were measured."""
    made: dict[str, Any] = {}
    for what, least in (("bytes", 8.0), ("decoded", 1.5)):
        own = results["ours"][what].get("per_cpu_second")
        for name in READERS:
            peer = results.get(name, {}).get(what, {}).get("per_cpu_second")
            if own and peer:
                bar = least if name == "webdataset" else 1.0
                made[f"{kind}_{what}_over_{name}"] = {
                    "value": round(own / peer, 3),
                    "bar": bar,
                    "ok": own >= bar * peer,
                }
    found = [results["ours"][f"resume at {step:,}"].get("first_batch") for step in STEPS]
    resumes = [seconds for seconds in found if seconds]
    if len(resumes) == len(STEPS):
        made[f"{kind}_resume_seconds"] = {"value": round(max(resumes), 3), "bar": 1.0, "ok": max(resumes) < 1.0}
    return made


def far_bars(kind: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """From a bucket, by the clock: the loader as a recipe configures it, beside every peer that could be measured."""
    own = found["ours"].get("per_second")
    peers = {name: figures["per_second"] for name, figures in found.items() if name in FAR and "per_second" in figures}
    return {
        f"{kind}_from_a_bucket_over_{name}": {"value": round(own / peer, 3), "bar": 1.0, "ok": own >= peer}
        for name, peer in peers.items()
        if own
    }


def rounded(value: Any) -> Any:
    """The same with four digits of every number."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Make the samples, measure everyone, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2040, help="in the dataset (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time of each measurement (%(default)s)")
    parser.add_argument("--ours", choices=sorted(OURS), help=argparse.SUPPRESS)  # one measurement, in a process
    parser.add_argument("--far", choices=sorted(loader_far.OURS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        report(
            lambda step: OURS[args.ours](args.folder, args.decode, step),
            args.step,
            args.seconds if not args.step else 0,
        )
        return
    if args.far:
        report(lambda _: loader_far.ours_far(LAYOUT, args.far), 0, args.seconds, wall=True)
        return
    python, absent = environment()
    made: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for kind, num_frames in FRAMES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_samples(folder / "ours" / "bench", args.samples, num_frames)
            reasons = dict(absent)
            for name in READERS:
                prepare = [str(python), str(HERE / "loader_peers.py"), "prepare", name, str(folder)]
                if name not in absent and (problem := started(prepare, clean_environment(), LIMIT).get("absent")):
                    reasons[name] = f"no samples in its format: {problem}"
            names = [*OURS, *(name for name in READERS if name not in reasons)]
            results = {name: measure_all(python, name, folder, args.seconds) for name in names}
            far = measure_far(python, folder, [name for name in READERS if name not in reasons], args.seconds)
            size = sum(path.stat().st_size for path in (folder / "ours" / "bench").glob("*.tar")) / args.samples
        print(f"\n{kind}: {args.samples:,} samples of {size / 1e3:.1f} kB, {cpu_name()}")
        table(results)
        far_table(far)
        for name, reason in reasons.items():
            print(f"absent: {name}: {reason}")
        made |= bars(kind, results) | far_bars(kind, far)
        figures[kind] = {"bytes_of_a_sample": round(size), "near": rounded(results), "from_a_bucket": rounded(far)}
    print(json.dumps({"bench": "loader", "hardware": cpu_name(), "figures": figures, "bars": made}))


if __name__ == "__main__":
    main()
