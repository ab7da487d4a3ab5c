"""Make the demo's raw data: ten small datasets of real handwritten digits, and a tokenizer trained on their texts.

Datasets that exist already with the same settings are kept. Example:

    python tools/make_demo_data.py --scale 0.1
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from molmo2.demo.image_sets import DemoExample
from molmo2.demo.sets import SETS, DemoSet, is_complete, make_set, texts
from molmo2.processing.new_tokenizer import train_demo_tokenizer
from shards.command import run


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("MOLMO2_DATA", "data")) / "raw"
    parser.add_argument("--out", type=Path, default=default, help="directory of raw data (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of every dataset, a fraction of the full demo")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the samples; it does not change the split")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (%(default)s)")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error(f"--scale {args.scale}: it must be above 0")
    return args


def _bar(name: str, position: int) -> object:
    def progress(made: Iterable[DemoExample], total: int) -> Iterator[DemoExample]:
        return iter(tqdm(made, desc=f"{name:20}", total=total, unit="ex", position=position, mininterval=0.5))

    return progress


def _make(demo: DemoSet, raw: Path, seed: int, scale: float, position: int) -> None:
    make_set(demo, raw, seed, scale, _bar(demo.name, position))  # type: ignore[arg-type]


def main() -> None:
    """Make the missing datasets; train the tokenizer if a dataset is new or there is no tokenizer."""
    args = parse_args()
    missing = [demo for demo in SETS if not is_complete(demo, args.out, args.seed, args.scale)]
    tokenizer = args.out / "tokenizer"
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(_make, demo, args.out, args.seed, args.scale, i) for i, demo in enumerate(missing)]
        for job in jobs:
            job.result()
    if missing or not (tokenizer / "tokenizer_config.json").exists():
        train_demo_tokenizer(texts(args.out), tokenizer)
    print(f"demo data in {args.out}: {len(missing)} sets made, {len(SETS) - len(missing)} kept")


if __name__ == "__main__":
    run(main)
