"""Seconds and memory until a rank has planned its first step, where the mixture has very many samples.

    python benchmarks/bench_open.py                       10^8 samples, 8 GB of sidecars in a temporary folder
    python benchmarks/bench_open.py --rows 1000000

It writes one dataset of which only the indexes exist, and opens it in new processes: as the first rank of a machine,
which hashes every sidecar; as a later one, which finds them verified; and as two that start at the same time. Seconds
are from the start of opening to the first step's packs; the start of Python and imports do not count. The sidecars were
just written, so the page cache holds as much of them as memory allows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_plan import LAYOUT, ROWS_PER_SHARD, VARIANTS, cpu_name
from tqdm import tqdm

from shards.build.writer import npy_bytes, row_facts
from shards.format import FORMAT_VERSION, DatasetIndex, ShardInfo, Totals, index_dtype

OPEN = """
import json, resource, sys, time
from shards.stream.mixture import MixtureSpec
from shards.stream.plan import Cursor, PlanSettings, open_plan
since = time.perf_counter()
mixture = MixtureSpec.model_validate({"groups": {"g": {"rate": 1, "datasets": {"all": None}}}})
plan = open_plan([sys.argv[1]], mixture, PlanSettings(sequence_length=4096, max_crops=64, packs_per_step=128))
opened = time.perf_counter()
plan.step(Cursor())
used = [line.split() for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(json.dumps({"open": opened - since, "first": time.perf_counter() - since, "mib": int(used[0][1]) / 1024}))
"""
AGE = 3  # seconds; a file that was written just now is not remembered as verified


def write_rows(root: Path, num_rows: int) -> None:
    """A dataset of so many rows, all shards with the same lengths."""
    folder = root / "all"
    folder.mkdir()
    rng = np.random.Generator(np.random.Philox(0))
    rows = np.zeros(ROWS_PER_SHARD, index_dtype(VARIANTS))
    rows["num_tokens"] = rng.integers(100, 2000, (ROWS_PER_SHARD, VARIANTS))
    rows["num_crops"], rows["loss_weight"] = rows["num_tokens"] // 150, 1.0
    rows["key_hash"] = np.arange(ROWS_PER_SHARD)
    data, infos = npy_bytes(rows), []
    for number in tqdm(range(num_rows // ROWS_PER_SHARD), desc="sidecars", leave=False):
        (folder / f"{number:06d}.idx.npy").write_bytes(data)
        infos.append(ShardInfo(name=f"{number:06d}", bytes=0, sha256="0" * 64, **row_facts(rows, data)))
    totals = dict.fromkeys(Totals.model_fields, 0) | {"samples": len(infos) * ROWS_PER_SHARD}
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        dataset="all",
        stage="sft",
        num_variants=VARIANTS,
        processor={"layout": LAYOUT.to_json()},
        source={},
        build={},
        totals=Totals(**totals),
        shards=tuple(infos),
    )
    (folder / "index.json").write_text(index.model_dump_json())


def open_in_processes(root: Path, count: int, cache: Path) -> list[dict[str, float]]:
    """Open the dataset in so many new processes at the same time; what each printed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", OPEN, str(root)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    """Measure, print the table, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8, help="number of samples (default: 10^8)")
    rows = parser.parse_args().rows // ROWS_PER_SHARD * ROWS_PER_SHARD
    root = Path(tempfile.mkdtemp(prefix="bench-open-"))
    try:
        write_rows(root, rows)
        time.sleep(AGE)
        found = {
            "first rank": open_in_processes(root, 1, root / "cache"),
            "next rank": open_in_processes(root, 1, root / "cache"),
            "two at once, anew": open_in_processes(root, 2, root / "other-cache"),
        }
    finally:
        shutil.rmtree(root)
    print(f"{rows:,} rows in {rows // ROWS_PER_SHARD:,} shards\n{'':20s}{'open, s':>10}{'first step, s':>15}{'MiB':>8}")
    for name, runs in found.items():
        for run in runs:
            print(f"{name:20s}{run['open']:>10.2f}{run['first']:>15.2f}{run['mib']:>8.0f}")
    bars = {
        "first_rank_seconds": (found["first rank"][0]["first"], 5.0),
        "next_rank_seconds": (found["next rank"][0]["first"], 1.0),
    }
    shown = {name: {"value": round(value, 3), "bar": bar, "ok": value <= bar} for name, (value, bar) in bars.items()}
    print(json.dumps({"bench": "open", "hardware": cpu_name(), "rows": rows, "bars": shown}))


if __name__ == "__main__":
    main()
